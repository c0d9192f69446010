"""The demo's recipe from files to filtered, deduplicated documents, against the same steps in stock datatrove.

Read, extract, repair, identify the language, filter by the demo's rules, MinHash, write: no tokenizer, which datatrove
does not train. Language identification is the same model in both, and each source has the filters that its rule set in
configs/data/demo.toml is made of; stages that cut parts out of documents are off, and so is the comparison of
near-duplicates' texts. Both read the same part of the demo's files. Before the clock starts both go through a smaller
part, so that everything is imported, compiled and loaded.

Documents that one keeps and the other does not are counted by what dropped them: ours by rule, datatrove's by the
definition that `definitions` finds. The demo's rules are the paper's where datatrove has its own (configs/rules.toml
says in what they differ), and its pages are extracted by resiliparse.
"""

import gzip
import io
import json
from collections import Counter
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
from resiliparse.parse.encoding import bytes_to_str, detect_encoding
from rich.console import Console

from configs.data import DataConfig
from configs.loader import load
from data_pipeline.core.run_context import RunContext
from data_pipeline.core.shards import read_records, shard_path, shards_under
from data_pipeline.core.stage import perform, sole_user
from data_pipeline.core.tables import read_table, shards_of
from data_pipeline.executors.local_executor import LocalExecutor
from data_pipeline.executors.stage_tasks import quiet
from data_pipeline.language.identification import model_path
from data_pipeline.run import recipe as every_stage
from tests.bench.data_pipeline.definitions import why
from tests.bench.data_pipeline.heuristics import peers
from tests.bench.data_pipeline.measure import DEMO, LANGUAGES, ROOT, Result, cpu_seconds, spread

_SOURCES = ("english", "chinese", "code", "web")
CUTTING = ("decontaminate", "lines", "substrings", "pii")  # stages that cut parts out of documents are off
_WARM_UP_MB = 0.8  # fewer would leave one Chinese document, and a held-out split needs two


def run(megabytes: float, folder: Path) -> Result:
    """Measures Trivium and datatrove on about `megabytes` of the demo's files, unpacked, from all sources."""
    warm, corpus = folder / "warm-up", folder / "corpus"
    lay_out(_WARM_UP_MB, warm)
    lay_out(megabytes, corpus)
    _ours(warm, folder / "warm-ours")
    _theirs(warm, folder / "warm-theirs")
    kept: dict[str, Fates] = {}
    ours = cpu_seconds(lambda: kept.update(ours=_ours(corpus, folder / "ours")))
    theirs = cpu_seconds(lambda: kept.update(theirs=_theirs(corpus, folder / "theirs")))
    size = extracted_mb(folder / "ours")
    said, facts = _compared(kept["ours"], kept["theirs"], folder / "ours")
    return Result("whole demo recipe", size, ours, theirs, 10, "stock datatrove, the same steps", said, facts)


def lay_out(megabytes: float, folder: Path) -> None:
    """Writes an equal part of each of the demo's files into a folder like the demo's."""
    folder.mkdir(parents=True)
    manifest = json.loads((DEMO / "manifest.json").read_text(encoding="utf-8"))
    sizes = {source: manifest[_file(source)]["raw_bytes"] for source in _SOURCES}
    for source in _SOURCES:
        share = megabytes * sizes[source] / sum(sizes.values())
        content = (DEMO / _file(source)).read_bytes()
        members = _members(content) if source == "web" else gzip.decompress(content).splitlines(keepends=True)
        part = spread(members, [sizes[source] // len(members)] * len(members), share)
        (folder / _file(source)).write_bytes(b"".join(part) if source == "web" else gzip.compress(b"".join(part)))


def _file(source: str) -> str:
    return "web.warc.gz" if source == "web" else f"{source}.jsonl.gz"


def _members(warc: bytes) -> list[bytes]:
    """Returns the compressed records of a WARC file that are pages."""
    starts, pages = [], []
    for record in ArchiveIterator(io.BytesIO(warc), parse_http=False):
        starts.append(record.stream_pos)
        pages.append(record.record_type == WarcRecordType.response)
    ends = [*starts[1:], len(warc)]
    return [warc[start:end] for start, end, page in zip(starts, ends, pages, strict=True) if page]


Fates = dict[str, str]  # document -> what dropped it, "" if it is kept


def demo_config(corpus: Path, run_dir: Path) -> DataConfig:
    """Returns configs/data/demo.toml for files in `corpus`, without the steps that datatrove's recipe lacks."""
    files = [f'sources.{source}.files=["{corpus / _file(source)}"]' for source in _SOURCES]
    off = [*(f"{name}.enabled=false" for name in CUTTING), "canaries={}", "dedup.verify=false"]
    settings = [f'run.dir="{run_dir}"', "run.workers=1", *files, *off]
    return load(DataConfig, ROOT / "configs/data/demo.toml", settings)


def _ours(corpus: Path, run_dir: Path) -> Fates:
    config = demo_config(corpus, run_dir)
    with sole_user(run_dir):
        quiet(None)
        for stage in every_stage(RunContext(config, run_dir, Console(file=io.StringIO()), LocalExecutor(1))):
            perform(stage, run_dir, None)
            if stage.name == "documents":
                break
    fates = {}
    for name in ("language", "filter", "dedup"):
        for shard in shards_of(run_dir / name):
            rows = read_table(run_dir / name, shard).select(["id", "verdict"]).to_pylist()
            fates |= {row["id"]: row["verdict"] for row in rows}
    return fates


def extracted_mb(run_dir: Path) -> float:
    """Returns the megabytes of text after extraction."""
    manifest = json.loads((run_dir / "extract" / "stage.json").read_text(encoding="utf-8"))
    return float(manifest["total"]["passed_on"]["bytes"]) / 1e6


def _compared(ours: Fates, theirs: Fates, run_dir: Path) -> tuple[str, dict[str, Any]]:
    documents = ours.keys() | theirs.keys()
    texts = _texts(run_dir)
    ours_only, theirs_only = Counter[str](), Counter[str]()
    agree = 0
    for document in documents:
        # A page in which no main text was found, or whose extraction timed out, has no fate.
        mine, its = ours.get(document, "no main text"), theirs.get(document, "no main text")
        agree += (not mine) == (not its)
        if not mine and its:
            ours_only[why(its, *texts[document])] += 1
        elif mine and not its:
            theirs_only[mine] += 1
    share = agree / len(documents)
    said = (
        f"{share:.1%} of {len(documents)} documents; datatrove alone drops by {_counts(ours_only)}; "
        f"ours alone by {_counts(theirs_only)}"
    )
    return said, {"agreement": share, "ours_alone": dict(ours_only), "datatrove_alone": dict(theirs_only)}


def _texts(run_dir: Path) -> dict[str, tuple[str, str]]:
    """Returns (source, text after extraction) of each document."""
    return {
        record["id"]: (shard.split("/")[0], record["text"])
        for shard in shards_under(run_dir / "extract")
        for record in read_records(shard_path(run_dir / "extract", shard))
    }


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common()) or "nothing"


class FateRecorder(PipelineStep):
    """Step that passes documents on and sets their fate to the next step, which drops those that come no farther."""

    def __init__(self, fates: Fates, then: str) -> None:
        super().__init__()
        self.fates, self.then = fates, then

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            self.fates[document.id] = self.then
            yield document


class Pages(PipelineStep):
    """Reader of the WARC file with fastwarc, since datatrove's own reader needs a system library."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with self.path.open("rb") as file:
            for record in ArchiveIterator(file, record_types=WarcRecordType.response):
                page = record.reader.read()
                text = bytes_to_str(page, detect_encoding(page, html5_compatible=True) or "utf-8")
                yield Document(text=text, id=record.record_id)


class Language(PipelineStep):
    """Language filter with the same lid.176 file and input as Trivium's stage; datatrove's downloads another file."""

    def __init__(self, language: str, least: float) -> None:
        super().__init__()
        self.language, self.least = language, least

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        model = fasttext.load_model(str(model_path()))
        for document in data:
            labels, scores = model.predict(" ".join(document.text[:10_000].split()), k=1)
            if labels and labels[0] == f"__label__{self.language}" and scores[0] >= self.least:
                yield document


def _steps(source: str, corpus: Path) -> list[PipelineStep]:
    if source == "web":
        # A timeout of a minute per page in place of a second, so that a busy machine does not change the result.
        reader: list[PipelineStep] = [Pages(corpus / _file(source)), Trafilatura(timeout=60)]
    else:
        reader = [JsonlReader(str(corpus), glob_pattern=_file(source))]
    if source == "code":
        return [*reader, FTFYFormatter(), LambdaFilter(_code)]
    if source == "chinese":
        return [*reader, FTFYFormatter(), Language("zh", 0.692), *peers("chinese").values()]
    filters: list[PipelineStep] = [GopherRepetitionFilter(), GopherQualityFilter()]
    if source == "web":
        filters.append(FineWebQualityFilter(char_duplicates_ratio=0.1))
    return [*reader, FTFYFormatter(), Language("en", 0.65), *filters]


def _code(document: Document) -> bool:
    """Whether a document is within the bounds of the rule set code@starcoder."""
    lines = [line for line in document.text.split("\n") if line.strip()]
    lengths = [len(line) for line in lines] or [0]
    alnum = sum(map(str.isalnum, document.text)) / max(len(document.text), 1)
    return sum(lengths) / len(lengths) <= 100 and max(lengths) <= 1000 and alnum >= 0.25


def _theirs(corpus: Path, folder: Path) -> Fates:
    fates: Fates = {}
    for number, source in enumerate(_SOURCES):
        data: Any = None
        for step in _steps(source, corpus):
            data = step.run(FateRecorder(fates, type(step).__name__).run(data) if data else None, 0, 1)
        passed = FateRecorder(fates, "MinHash").run(data)
        list(JsonlWriter(str(folder / "filtered"), f"{number:05d}.jsonl").run(passed, 0, 1))
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
    for rank in range(len(_SOURCES)):
        read = JsonlReader(texts).run(None, rank, len(_SOURCES))
        left = MinhashDedupFilter(str(folder / "remove")).run(read, rank, len(_SOURCES))
        written = JsonlWriter(str(folder / "kept")).run(left, rank, len(_SOURCES))
        list(FateRecorder(fates, "").run(written))
    return fates
