"""MinHash: signatures alone, and from text to text without near-duplicates, against datatrove's four stages.

The documents are those of a demo source, with a copy of every fifth that lacks some lines. Both read the same gzipped
JSONL and write what is left as gzipped JSONL. Before the clock starts, both have seen other documents, so that all code
is loaded. Recall and precision are measured against brute force: all pairs whose word 5-grams have a true similarity of
at least 0.8. If only one of the two keeps a document, the true similarity says why: if the one that keeps it removed a
similar document instead, they chose different survivors (ours is the best-scored, datatrove's the first); otherwise,
different bands had equal hashes.
"""

import gzip
import io
import json
import statistics
from collections import Counter
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

from configs.data import DataConfig
from configs.dedup import DedupConfig
from configs.loader import validate
from data_pipeline.core.run_context import RunContext
from data_pipeline.core.stage import perform, sole_user
from data_pipeline.core.tables import read_table, shards_of
from data_pipeline.dedup.signatures import MinHasher
from data_pipeline.executors.local_executor import LocalExecutor
from data_pipeline.executors.stage_tasks import quiet
from data_pipeline.provenance.recall import similar_pairs
from data_pipeline.run import recipe as every_stage
from data_pipeline.scan.minhash import shingles
from data_pipeline.scan.words import Splitter
from tests.bench.data_pipeline.measure import LANGUAGES, Result, cpu_seconds, size_mb, texts

SIMILAR = 0.8
_MEETS = 0.5  # similarity at which 14 bands of 8 rows find one pair of 19
_SPLITTERS = {"english": "words", "chinese": "cjk"}


def with_copies(documents: list[str]) -> list[str]:
    """Returns the documents and a copy of every fifth one, which lacks every tenth line."""
    copies = ["\n".join(line for n, line in enumerate(text.split("\n")) if n % 10 != 7) for text in documents[::5]]
    return documents + copies


def run(source: str, megabytes: float, folder: Path) -> list[Result]:
    documents = with_copies(texts(source, megabytes))
    corpus = _corpus(documents, folder / "corpus")
    quiet(None)
    signatures = _signatures(source, documents, folder)
    few = _corpus(documents[:20], folder / "few")
    _ours(source, few, folder / "warm-ours")
    _theirs(source, few, folder / "warm-theirs")
    # Trivium takes half a second and runs before and after the peer, whose time is long enough for the machine's speed
    # to change.
    runs = [_ours(source, corpus, folder / f"before-{number}") for number in range(3)]
    theirs, peer_kept = _theirs(source, corpus, folder / "theirs")
    runs += [_ours(source, corpus, folder / f"after-{number}") for number in range(2)]
    ours, kept = statistics.median(seconds for seconds, _ in runs), runs[0][1]
    similar = _similar_pairs(source, documents)
    truth = [pair for pair, similarity in similar.items() if similarity >= SIMILAR]
    facts: dict[str, Any] = {"ours": _against(truth, kept), "datatrove": _against(truth, peer_kept)}
    facts["differ"] = _differences(len(documents), similar, kept, peer_kept)
    said = "; ".join(
        f"{who}: recall {facts[who]['recall']:.3f} of {len(truth)} pairs, precision {facts[who]['precision']:.3f}"
        for who in ("ours", "datatrove")
    )
    differ = ", ".join(f"{reason} {count}" for reason, count in facts["differ"].items()) or "none"
    said += f"; of {len(documents)} documents, kept by one alone: {differ}"
    size = size_mb(documents)
    whole = Result(f"MinHash end to end, {source}", size, ours, theirs, 30, "datatrove stages 1 to 4", said, facts)
    return [signatures, whole]


def _corpus(documents: list[str], folder: Path) -> Path:
    folder.mkdir(parents=True)
    with gzip.open(folder / "00000.jsonl.gz", "wt", encoding="utf-8") as out:
        out.writelines(json.dumps({"id": str(n), "text": text}) + "\n" for n, text in enumerate(documents))
    return folder


def _signatures(source: str, documents: list[str], folder: Path) -> Result:
    hasher, splitter = MinHasher(DedupConfig()), Splitter[_SPLITTERS[source]]
    peer = MinhashDedupSignature(str(folder / "unused"), MinhashConfig(), language=LANGUAGES[source])
    hasher.keys(documents[0], splitter)
    peer.get_shingles("Loaded before the clock starts, five words and more.")
    ours = [cpu_seconds(lambda: [hasher.keys(text, splitter) for text in documents]) for _ in range(5)]
    theirs = cpu_seconds(lambda: [peer.get_signature(s) for text in documents if len(s := peer.get_shingles(text))])
    ours += [cpu_seconds(lambda: [hasher.keys(text, splitter) for text in documents]) for _ in range(5)]
    size = size_mb(documents)
    peer_name = "datatrove stage 1, without its files"
    return Result(f"MinHash signatures, {source}", size, statistics.median(ours), theirs, 100, peer_name)


def _ours(source: str, corpus: Path, folder: Path) -> tuple[float, set[int]]:
    """Returns (CPU seconds of the stages signatures, dedup and documents, ids of the documents that are kept)."""
    rules = {"splitter": _SPLITTERS[source]}
    tree = {
        "run": {"dir": str(folder), "workers": 1},
        "sources": {"s": {"files": [str(corpus / "*.gz")], "format": "jsonl", "rules": {"any": "none"}}},
        "rules": {"none": rules},
        "dedup": {"verify": False},  # datatrove does not compare texts
        "mixture": {"weights": {"s": 1.0}},
    }
    config = validate(DataConfig, tree)
    seconds = 0.0
    with sole_user(folder):
        stages = every_stage(RunContext(config, folder, Console(file=io.StringIO()), LocalExecutor(1)))
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


def _similar_pairs(source: str, documents: list[str]) -> dict[tuple[int, int], float]:
    """Returns all pairs of similar documents, found by brute force, with their similarity."""
    window = Splitter[_SPLITTERS[source]].window(DedupConfig().ngram)
    pairs, values = similar_pairs([np.unique(shingles(text, window)) for text in documents], _MEETS)
    return {(one, other): value for (one, other), value in zip(pairs.tolist(), values.tolist(), strict=True)}


def _differences(count: int, similar: dict[tuple[int, int], float], *kept: set[int]) -> dict[str, int]:
    """Counts, by reason, the documents that one of the two kept and the other did not."""
    reasons = Counter[str]()
    for document in range(count):
        if (document in kept[0]) == (document in kept[1]):
            continue
        keeper = kept[0] if document in kept[0] else kept[1]
        like = {sum(pair) - document: value for pair, value in similar.items() if document in pair}
        if any(other not in keeper for other in like):
            reasons["another survivor"] += 1
        elif like:
            reasons[f"chance of the bands at a similarity of {max(like.values()):.2f}"] += 1
        else:
            reasons[f"nothing alike above {_MEETS}"] += 1
    return dict(sorted(reasons.items()))


def _against(truth: list[tuple[int, int]], kept: set[int]) -> dict[str, float]:
    """Returns recall, the share of similar pairs that lost a document, and precision.

    Precision is the share of the removed documents that are in such a pair.
    """
    gone = {number for pair in truth for number in pair if number not in kept}
    everyone = {number for number in range(max(kept, default=-1) + 1)} | {n for pair in truth for n in pair}
    removed = everyone - kept
    caught = sum(one not in kept or other not in kept for one, other in truth)
    return {"recall": caught / max(len(truth), 1), "precision": len(gone) / max(len(removed), 1)}
