"""MinHash: signatures alone, and from text to text without near-duplicates, against datatrove's four stages.

The documents are a demo source's, and of every fifth a copy that lacks some lines. Both read the same gzipped JSONL and
write what is left as gzipped JSONL. Recall and precision are against brute force: all pairs of at least 0.8 true
similarity of word 5-grams.
"""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from rich.console import Console

from configs.data import DataConfig, DedupConfig
from configs.loader import validate
from data_pipeline.dedup.recall import similar_pairs
from data_pipeline.dedup.signatures import MinHasher
from data_pipeline.executors.local import LocalExecutor
from data_pipeline.executors.tasks import quiet
from data_pipeline.run import all_stages
from data_pipeline.scan.minhash import shingles
from data_pipeline.scan.words import Splitter
from data_pipeline.stage import perform, sole_user
from data_pipeline.tables import read_table, shards_of
from tests.bench.data_pipeline.measure import LANGUAGES, Result, cpu_seconds, size_mb, texts

SIMILAR = 0.8
_SPLITTERS = {"english": "words", "chinese": "cjk"}


def with_copies(documents: list[str]) -> list[str]:
    """The documents, and of every fifth one a copy without each tenth line."""
    copies = ["\n".join(line for n, line in enumerate(text.split("\n")) if n % 10 != 7) for text in documents[::5]]
    return documents + copies


def run(source: str, megabytes: float, folder: Path) -> list[Result]:
    documents = with_copies(texts(source, megabytes))
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    with gzip.open(corpus / "00000.jsonl.gz", "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(documents))
    quiet(None)
    signatures = _signatures(source, documents, folder)
    ours, kept = _ours(source, corpus, folder / "ours")
    theirs, peer_kept = _theirs(source, corpus, folder / "theirs")
    truth = _similar_pairs(source, documents)
    facts = {"ours": _against(truth, kept), "datatrove": _against(truth, peer_kept)}
    said = "; ".join(
        f"{who}: recall {fact['recall']:.3f} of {len(truth)} pairs, precision {fact['precision']:.3f}"
        for who, fact in facts.items()
    )
    size = size_mb(documents)
    whole = Result(
        f"MinHash end to end, {source}", size / ours, size / theirs, 30, "datatrove stages 1 to 4", said, facts
    )
    return [signatures, whole]


def _signatures(source: str, documents: list[str], folder: Path) -> Result:
    hasher, splitter = MinHasher(DedupConfig()), Splitter[_SPLITTERS[source]]
    peer = MinhashDedupSignature(str(folder / "unused"), MinhashConfig(), language=LANGUAGES[source])
    hasher.keys(documents[0], splitter)
    peer.get_shingles("Loaded before the clock starts, five words and more.")
    ours = cpu_seconds(lambda: [hasher.keys(text, splitter) for text in documents], times=5)
    theirs = cpu_seconds(lambda: [peer.get_signature(s) for text in documents if len(s := peer.get_shingles(text))])
    size = size_mb(documents)
    return Result(
        f"MinHash signatures, {source}", size / ours, size / theirs, 100, "datatrove stage 1, without its files"
    )


def _ours(source: str, corpus: Path, folder: Path) -> tuple[float, set[int]]:
    """(CPU seconds of signatures, dedup and documents; the ids that are left)."""
    rules = {"splitter": _SPLITTERS[source]}
    tree = {
        "run": {"dir": str(folder), "workers": 1},
        "sources": {"s": {"files": [str(corpus / "*.gz")], "format": "jsonl", "rules": {"any": "none"}}},
        "rules": {"none": rules},
        "mixture": {"weights": {"s": 1.0}},
    }
    config = validate(DataConfig, tree)
    seconds = 0.0
    with sole_user(folder):
        stages = all_stages(config, folder, Console(file=io.StringIO()), LocalExecutor(1))
        timed = [stage.name for stage in stages if stage.name in ("signatures", "dedup", "documents")]
        for stage in stages[: 1 + [stage.name for stage in stages].index("documents")]:
            spent = cpu_seconds(lambda stage=stage: perform(stage, folder, None))  # type: ignore[misc]
            seconds += spent if stage.name in timed else 0.0
    rows = [row for shard in shards_of(folder / "dedup") for row in read_table(folder / "dedup", shard).to_pylist()]
    return seconds, {int(row["id"]) for row in rows if not row["verdict"]}


def _theirs(source: str, corpus: Path, folder: Path) -> tuple[float, set[int]]:
    config = MinhashConfig()

    def step(build: Callable[[], Any]) -> None:
        list(build() or ())

    def whole() -> None:
        sign = MinhashDedupSignature(str(folder / "sigs"), config, language=LANGUAGES[source])
        sign.run(JsonlReader(str(corpus)).run(None, 0, 1), 0, 1)
        buckets = MinhashDedupBuckets(str(folder / "sigs"), str(folder / "buckets"), config=config)
        for rank in range(config.num_buckets):
            step(lambda rank=rank: buckets.run(None, rank, config.num_buckets))  # type: ignore[misc]
        cluster = MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config)
        step(lambda: cluster.run(None, 0, 1))
        kept = MinhashDedupFilter(str(folder / "remove")).run(JsonlReader(str(corpus)).run(None, 0, 1), 0, 1)
        list(JsonlWriter(str(folder / "kept")).run(kept, 0, 1))

    seconds = cpu_seconds(whole)
    kept = set()
    for path in (folder / "kept").glob("*.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            kept |= {int(json.loads(line)["id"]) for line in lines}
    return seconds, kept


def _similar_pairs(source: str, documents: list[str]) -> list[tuple[int, int]]:
    """All of them, by brute force."""
    window = Splitter[_SPLITTERS[source]].window(DedupConfig().ngram)
    grams = [np.unique(shingles(text, window)) for text in documents]
    pairs, _ = similar_pairs(grams, SIMILAR)
    return [(one, other) for one, other in pairs.tolist()]


def _against(truth: list[tuple[int, int]], kept: set[int]) -> dict[str, float]:
    """Recall: pairs of which one went, at least. Precision: documents gone that had such a partner."""
    gone = {number for pair in truth for number in pair if number not in kept}
    everyone = {number for number in range(max(kept, default=-1) + 1)} | {n for pair in truth for n in pair}
    removed = everyone - kept
    caught = sum(one not in kept or other not in kept for one, other in truth)
    return {"recall": caught / max(len(truth), 1), "precision": len(gone) / max(len(removed), 1)}
