"""Measures what the page draws from a data run's tables: histograms, counts of languages, and clusters of duplicates.

Tables are read shard by shard, only in the columns that are needed. Results are counts in fixed bins and a few rows, so
that memory does not grow with the run. Texts are not read.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.rules import RuleSet
from data_pipeline.provenance.smallest import Smallest
from data_pipeline.report.page_samples import columns_of

SIZE_EDGES = 2.0 ** np.arange(0, 40.5, 0.5)  # bins of documents' bytes: two per doubling, up to 1 TB
_BINS = 40
_LANGUAGE = "language_score"  # the score that is in the language stage's tables
_LOG_FROM = 1000.0  # scores that are never negative and reach this value get logarithmic bins


@dataclass
class DocumentCounts:
    """Counts of documents by language and, in the bins of SIZE_EDGES, by size, before and after the run."""

    languages: dict[str, list[int]] = field(default_factory=dict)  # [documents, bytes, documents kept]
    before: dict[str, np.ndarray] = field(default_factory=dict)  # source -> int64 [bins], as extract published them
    after: dict[str, np.ndarray] = field(default_factory=dict)  # source -> int64 [bins], those that are kept


def documents(run_dir: Path, last: str) -> DocumentCounts:
    """Counts the documents that extract published, and those kept by `last`, the last stage with verdicts."""
    found = DocumentCounts()
    for table in columns_of(run_dir / "language", ["source", "bytes", "language", "verdict"]):
        kept = pc.cast(pc.equal(table["verdict"], ""), pa.int64())
        groups = table.append_column("kept", kept).group_by("language")
        for row in groups.aggregate([("bytes", "count"), ("bytes", "sum"), ("kept", "sum")]).to_pylist():
            counts = found.languages.setdefault(row["language"], [0, 0, 0])
            for index, name in enumerate(("bytes_count", "bytes_sum", "kept_sum")):
                counts[index] += row[name]
        _count_sizes(found.before, table)
    for table in columns_of(run_dir / last, ["source", "bytes"], pc.field("verdict") == ""):
        _count_sizes(found.after, table)
    return found


def _count_sizes(counts: dict[str, np.ndarray], table: pa.Table) -> None:
    """Adds a table's documents to the histogram of their source."""
    for source in table["source"].unique().to_pylist():
        sizes = table.filter(pc.equal(table["source"], source))["bytes"].to_numpy()
        binned, _ = np.histogram(np.clip(sizes, 1, SIZE_EDGES[-1]), SIZE_EDGES)
        counts[source] = counts.get(source, 0) + binned


@dataclass
class ShownCluster:
    """A cluster of duplicates, with a sample of its documents."""

    number: int
    size: int
    members: Smallest


def clusters(run_dir: Path, count: int, shown: int) -> tuple[list[ShownCluster], dict[int, int]]:
    """Returns the `count` largest clusters, with `shown` documents each, and {size above 1: number of clusters}."""
    sizes: Counter[int] = Counter()
    largest: dict[int, int] = {}
    for table in columns_of(run_dir / "dedup", ["cluster", "cluster_size"], pc.field("cluster_size") > 1):
        numbers, rows = np.unique(table["cluster"].to_numpy(), return_index=True)
        found = table["cluster_size"].to_numpy()
        values, occurrences = np.unique(found, return_counts=True)
        sizes.update(dict(zip(values.tolist(), occurrences.tolist(), strict=True)))
        largest.update(zip(numbers.tolist(), found[rows].tolist(), strict=True))
        largest = dict(heapq.nsmallest(count, largest.items(), key=lambda item: (-item[1], item[0])))
    # A cluster has one row per member, so that the number of clusters is rows / size.
    by_size = {size: rows // size for size, rows in sorted(sizes.items())}
    chosen = {number: ShownCluster(number, size, Smallest(shown)) for number, size in largest.items()}
    wanted = pc.field("cluster").isin(list(chosen))
    columns = ["source", "id", "bytes", "verdict", "head", "cluster"]
    for table in columns_of(run_dir / "dedup", columns, wanted) if chosen else []:
        for row in table.to_pylist():
            chosen[row["cluster"]].members.offer(row)
    return list(chosen.values()), by_size


@dataclass
class ScoreHistogram:
    """Histogram of the scores that one rule bounds: documents inside and outside of the bound, in the same bins."""

    rules: str
    score: str
    low: float | None  # the smallest value within the bound
    high: float | None  # the largest
    edges: np.ndarray  # float64 [bins + 1]
    logarithmic: bool
    inside: np.ndarray  # int64 [bins]
    outside: np.ndarray  # int64 [bins]
    unknown: int = 0  # documents without this score


def scores(run_dir: Path, rules: Mapping[str, RuleSet]) -> list[ScoreHistogram]:
    """Returns a histogram for each bound of each rule set whose score some document has.

    They are sorted by rule set, then by the number of documents outside the bound, the largest first.
    """
    ends: dict[tuple[str, str], tuple[float, float]] = {}
    for key, values in _values(run_dir, rules):
        if len(known := values[np.isfinite(values)]):
            low, high = ends.get(key, (np.inf, -np.inf))
            ends[key] = min(low, float(known.min())), max(high, float(known.max()))
    drawn = {}
    for (name, score), (low, high) in ends.items():
        bound = rules[name].bounds()[score]
        limits = [limit for limit in (bound.min, bound.max) if limit is not None]
        edges, logarithmic = _edges(min(low, *limits), max(high, *limits))
        counts = np.zeros((2, _BINS), np.int64)
        drawn[name, score] = ScoreHistogram(name, score, bound.min, bound.max, edges, logarithmic, *counts)
    for key, values in _values(run_dir, rules):
        if key in drawn:
            _count_scores(drawn[key], values)
    return sorted(drawn.values(), key=lambda one: (one.rules, -one.outside.sum(), one.score))


def _values(run_dir: Path, rules: Mapping[str, RuleSet]) -> Iterator[tuple[tuple[str, str], np.ndarray]]:
    """Yields (rule set, score) and float64 [rows] for each shard; NaN marks an unknown score."""
    bounded = {score for one in rules.values() for score in one.bounds()}
    # The score stage has no rows of the documents that the language stage dropped.
    for stage, wanted in (("language", bounded & {_LANGUAGE}), ("score", bounded - {_LANGUAGE})):
        for table in columns_of(run_dir / stage, ["rules", *sorted(wanted)]):
            for name, one in rules.items():
                mine = table.filter(pc.equal(table["rules"], name))
                for score in sorted(one.bounds().keys() & set(mine.column_names)):
                    yield (name, score), mine[score].to_numpy()


def _edges(low: float, high: float) -> tuple[np.ndarray, bool]:
    """Returns float64 [bins + 1] edges, and whether they are logarithmic."""
    if low == high:
        high = low + 1.0
    if low >= 0 and high >= _LOG_FROM:
        start = np.log10(max(low, 0.5))
        edges = np.logspace(start, np.log10(high), _BINS + 1)
        return edges, True
    return np.linspace(low, high, _BINS + 1), False


def _count_scores(drawn: ScoreHistogram, values: np.ndarray) -> None:
    """Adds scores to a histogram."""
    known = values[np.isfinite(values)]
    drawn.unknown += len(values) - len(known)
    outside = np.zeros(len(known), bool)
    if drawn.low is not None:
        outside |= known < drawn.low
    if drawn.high is not None:
        outside |= known > drawn.high
    # Rounding may put values slightly outside the edges; a score of 0 has no logarithm and is put in the first bin.
    within_edges = np.clip(known, drawn.edges[0], drawn.edges[-1])
    drawn.inside += np.histogram(within_edges[~outside], drawn.edges)[0]
    drawn.outside += np.histogram(within_edges[outside], drawn.edges)[0]
