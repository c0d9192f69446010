"""The demo's recipe from files to filtered, deduplicated documents, against the same steps in stock datatrove.

Read, extract, repair, identify the language, filter by the demo's rules, MinHash, write: no tokenizer, which datatrove
does not train. Language identification is the same model in both, and each source has the filters that its rule set in
configs/data/demo.toml is made of.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fasttext
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter, LambdaFilter
from datatrove.pipeline.formatters import FTFYFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from fastwarc.warc import ArchiveIterator, WarcRecordType
from rich.console import Console

from configs.data import DataConfig
from configs.loader import load
from data_pipeline.executors.local import LocalExecutor
from data_pipeline.language import model_path
from data_pipeline.run import all_stages
from data_pipeline.stage import perform, sole_user
from tests.bench.data_pipeline.heuristics import peers
from tests.bench.data_pipeline.measure import DEMO, LANGUAGES, ROOT, Result, cpu_seconds

_SOURCES = ("english", "chinese", "code", "web")


def run(folder: Path) -> Result:
    kept: dict[str, int] = {}
    ours = cpu_seconds(lambda: kept.update(ours=_ours(folder / "ours")))
    theirs = cpu_seconds(lambda: kept.update(theirs=_theirs(folder / "theirs")))
    size = _megabytes(folder / "ours")
    said = f"documents kept: {kept['ours']:,} and datatrove {kept['theirs']:,}"
    return Result("whole demo recipe", size / ours, size / theirs, 10, "stock datatrove, the same steps", said)


def _ours(folder: Path) -> int:
    off = [f"{name}.enabled=false" for name in ("decontaminate", "lines", "substrings", "pii")]
    settings = [f'run.dir="{folder}"', "run.workers=1", *off, "canaries={}"]
    config = load(DataConfig, ROOT / "configs/data/demo.toml", settings)
    with sole_user(folder):
        for stage in all_stages(config, folder, Console(file=io.StringIO()), LocalExecutor(1)):
            done = perform(stage, folder, None)
            if stage.name == "documents":
                return done.tally.total().kept.documents
    raise AssertionError("the demo has a documents stage")


def _megabytes(folder: Path) -> float:
    """Of text after extraction."""
    manifest = json.loads((folder / "extract" / "stage.json").read_text(encoding="utf-8"))
    return float(manifest["total"]["passed_on"]["bytes"]) / 1e6


class Pages(PipelineStep):
    """The WARC file read by fastwarc; datatrove's own reader needs a system library."""

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with (DEMO / "web.warc.gz").open("rb") as file:
            for record in ArchiveIterator(file, record_types=WarcRecordType.response):
                yield Document(text=record.reader.read().decode("utf-8", errors="replace"), id=record.record_id)


class Language(PipelineStep):
    """lid.176 as our language stage asks it; datatrove's own filter fetches another file of it."""

    def __init__(self, language: str, least: float) -> None:
        super().__init__()
        self.language, self.least = language, least

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        model = fasttext.load_model(str(model_path()))
        for document in data:
            labels, scores = model.predict(" ".join(document.text[:10_000].split()), k=1)
            if labels and labels[0] == f"__label__{self.language}" and scores[0] >= self.least:
                yield document


def _steps(source: str) -> list[PipelineStep]:
    if source == "web":
        reader: list[PipelineStep] = [Pages(), Trafilatura()]
    else:
        reader = [JsonlReader(str(DEMO), glob_pattern=f"{source}.jsonl.gz")]
    if source == "code":
        return [*reader, FTFYFormatter(), LambdaFilter(_code)]
    if source == "chinese":
        return [*reader, FTFYFormatter(), Language("zh", 0.692), *peers("chinese").values()]
    filters: list[PipelineStep] = [GopherRepetitionFilter(), GopherQualityFilter()]
    if source == "web":
        filters.append(FineWebQualityFilter(char_duplicates_ratio=0.1))
    return [*reader, FTFYFormatter(), Language("en", 0.65), *filters]


def _code(document: Document) -> bool:
    """The bounds of code@starcoder."""
    lines = [line for line in document.text.split("\n") if line.strip()]
    lengths = [len(line) for line in lines] or [0]
    alnum = sum(map(str.isalnum, document.text)) / max(len(document.text), 1)
    return sum(lengths) / len(lengths) <= 100 and max(lengths) <= 1000 and alnum >= 0.25


def _theirs(folder: Path) -> int:
    for number, source in enumerate(_SOURCES):
        data: Any = None
        for step in [*_steps(source), JsonlWriter(str(folder / "filtered"), f"{number:05d}.jsonl")]:
            data = step.run(data, 0, 1)
        list(data)
    config = MinhashConfig()
    texts = str(folder / "filtered")
    for rank, source in enumerate(_SOURCES):
        language = LANGUAGES.get(source, LANGUAGES["english"])
        sign = MinhashDedupSignature(str(folder / "sigs"), config, language=language)
        sign.run(JsonlReader(texts).run(None, rank, len(_SOURCES)), rank, len(_SOURCES))
    buckets = MinhashDedupBuckets(str(folder / "sigs"), str(folder / "buckets"), config=config)
    for rank in range(config.num_buckets):
        list(buckets.run(None, rank, config.num_buckets) or ())
    list(MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config).run(None, 0, 1) or ())
    kept = 0
    for rank in range(len(_SOURCES)):
        read = JsonlReader(texts).run(None, rank, len(_SOURCES))
        left = MinhashDedupFilter(str(folder / "remove")).run(read, rank, len(_SOURCES))
        kept += sum(1 for _ in JsonlWriter(str(folder / "kept")).run(left, rank, len(_SOURCES)))
    return kept
