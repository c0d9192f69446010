"""`trivium data recall CONFIG`: recall and precision of a finished run's near-duplicate removal, against brute force.

The true pairs are all pairs of documents that the filter kept whose sets of word n-grams have at least a given Jaccard
similarity. They are found without signatures, by an inverted index over each document's rarest n-grams, which misses no
pair (`similar_pairs`). Recall is the share of these pairs of which the run dropped at least one document. Precision is
the share of the documents dropped as duplicates that form a true pair with the document kept in their place, or equal
it. The command reads the run's texts once, holds their n-grams in memory (8 bytes a word), which suits corpora of up to
a few GB or a sample of a larger one, and writes nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
from rich.console import Console
from rich.table import Table

from configs.cli import entrypoint, parse_args
from configs.data import DataConfig
from configs.loader import ConfigError, load
from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.console import say, wide_console
from data_pipeline.core.stage import has_finished
from data_pipeline.core.tables import kept_rows, read_table, shards_of
from data_pipeline.dedup.greedy import jaccard
from data_pipeline.provenance.excerpts import texts
from data_pipeline.scan.minhash import shingles
from data_pipeline.scan.words import Splitter

SIMILAR = 0.75  # the similarity that FineWeb's bands and rows aim at (arXiv 2406.17557, section 3.4)
_SHOWN = 5
_DUPLICATES = ("exact_duplicate", "near_duplicate")
_ACROSS = "across sources"


@dataclass
class CandidateDocuments:
    """The documents that deduplication saw, in parallel lists, with their sets of n-grams."""

    ids: list[str]
    sources: list[str]
    verdicts: list[str]
    clusters: list[int]
    grams: list[np.ndarray]  # uint64, ascending and distinct
    survivors: dict[int, int]  # cluster -> index of its document that was kept


def documents_of(config: DataConfig, run_dir: Path) -> CandidateDocuments:
    """Reads the candidates of a run, without canaries; raises ConfigError if its dedup stage is not finished."""
    if not has_finished(run_dir, "dedup"):
        raise ConfigError(f"run.dir = {str(run_dir)!r} holds no finished dedup stage; run: trivium data run CONFIG")
    splitters = {name: Splitter[rules.splitter] for name, rules in config.rules.items()}
    found = CandidateDocuments([], [], [], [], [], {})
    shards = [shard for shard in shards_of(run_dir / "dedup") if not is_canary(shard)]
    for shard in shards:
        rows = {row["row"]: row for row in read_table(run_dir / "dedup", shard).to_pylist()}
        rules = {row["row"]: row["rules"] for row in kept_rows(read_table(run_dir / "language", shard)).to_pylist()}
        for number, text in texts(run_dir, shard, rows.keys()):
            row, window = rows[number], splitters[rules[number]].window(config.dedup.ngram)
            if not row["verdict"]:
                found.survivors[row["cluster"]] = len(found.ids)
            found.grams.append(np.unique(shingles(text, window)))
            found.ids.append(row["id"])
            found.sources.append(row["source"])
            found.verdicts.append(row["verdict"])
            found.clusters.append(row["cluster"])
    return found


def similar_pairs(grams: Sequence[np.ndarray], least: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns all pairs of sets of at least `least` Jaccard similarity, int64 [pairs, 2], and their similarities.

    Each pair has the smaller index first. Prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007, All-Pairs)
    finds candidates: with members ordered from the rarest on, sets of size n can only be so similar if they share one
    of their first n - ceil(least * n) + 1 members. The similarity of candidates is then computed exactly. `grams` are
    ascending and distinct; an empty set is similar to no other.
    """
    if not grams:
        return np.zeros((0, 2), np.int64), np.zeros(0)
    sizes = np.array([len(one) for one in grams], np.int64)
    owners = np.repeat(np.arange(len(grams)), sizes)
    _, number, counts = np.unique(np.concatenate(grams), return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    order = np.lexsort((rank[number], owners))
    members = rank[number][order]  # members of each set in turn, the rarest first
    ends = np.cumsum(sizes)
    # Slightly below `least`, so that rounding never shortens a prefix: more candidates, the same pairs.
    prefixes = sizes - np.ceil((least - 1e-9) * sizes).astype(np.int64) + 1
    index = np.arange(len(members)) - np.repeat(ends - sizes, sizes)
    first = index < np.repeat(prefixes, sizes)
    keys, holders = members[first], owners[first]
    by_key = np.lexsort((holders, keys))
    keys, holders = keys[by_key], holders[by_key]
    edges = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1], True])
    candidates = _candidates(holders, edges, sizes, least)
    candidates = np.unique(candidates, axis=0) if len(candidates) else candidates
    similarity = np.array([jaccard(grams[one], grams[other]) for one, other in candidates.tolist()], np.float64)
    return candidates[similarity >= least], similarity[similarity >= least]


@numba.njit(cache=True)
def _candidates(holders: np.ndarray, edges: np.ndarray, sizes: np.ndarray, least: float) -> np.ndarray:
    """Returns int64 [pairs, 2], with repetitions: sets that share a prefix member and have close enough sizes."""
    count = 0
    for round in range(2):  # the first counts, the second fills
        if round == 1:
            found = np.empty((count, 2), np.int64)
            count = 0
        for group in range(len(edges) - 1):
            for i in range(edges[group], edges[group + 1]):
                for j in range(i + 1, edges[group + 1]):
                    small, large = sizes[holders[i]], sizes[holders[j]]
                    if small > large:
                        small, large = large, small
                    if small >= (least - 1e-9) * large:
                        if round == 1:
                            found[count, 0], found[count, 1] = holders[i], holders[j]
                        count += 1
    return found


@dataclass
class SourceRecall:
    """Counts of true pairs and of dropped documents in one source, or in all."""

    pairs: int = 0
    missed: int = 0  # pairs of which both documents were kept
    dropped: int = 0  # documents dropped as duplicates
    wrong: int = 0  # dropped documents that are no true pair with the document kept in their place

    @property
    def recall(self) -> float:
        """Share of the true pairs of which a document was dropped; NaN without pairs."""
        return 1 - self.missed / self.pairs if self.pairs else float("nan")

    @property
    def precision(self) -> float:
        """Share of the dropped documents that form a true pair with the document kept instead; NaN without drops."""
        return 1 - self.wrong / self.dropped if self.dropped else float("nan")


@dataclass
class Recall:
    """Result of a comparison with brute force, with the pairs and documents that it found to be wrong."""

    by_source: dict[str, SourceRecall]
    missed: list[tuple[int, int, float]]  # (document, document, similarity), the most similar first
    wrong: list[int]  # indices of documents


def measure(documents: CandidateDocuments, pairs: np.ndarray, similarity: np.ndarray) -> Recall:
    """Compares the run's verdicts with the true pairs; pairs of two sources are counted under `across sources`."""
    by_source: dict[str, SourceRecall] = {}
    missed = []
    similar = set(map(tuple, pairs.tolist()))
    for (one, other), value in zip(pairs.tolist(), similarity.tolist(), strict=True):
        name = documents.sources[one] if documents.sources[one] == documents.sources[other] else _ACROSS
        counts = by_source.setdefault(name, SourceRecall())
        counts.pairs += 1
        if not documents.verdicts[one] and not documents.verdicts[other]:
            counts.missed += 1
            missed.append((one, other, value))
    wrong = []
    for number, verdict in enumerate(documents.verdicts):
        counts = by_source.setdefault(documents.sources[number], SourceRecall())
        if verdict in _DUPLICATES:
            counts.dropped += 1
            stays = documents.survivors[documents.clusters[number]]
            alike = (min(number, stays), max(number, stays)) in similar
            if verdict != "exact_duplicate" and not alike:  # a text without n-grams is in no pair
                counts.wrong += 1
                wrong.append(number)
    return Recall(by_source, sorted(missed, key=lambda pair: (-pair[2], pair[:2])), wrong)


def total(measured: Recall) -> SourceRecall:
    """Returns the sum over all sources."""
    parts = measured.by_source.values()
    return SourceRecall(*(sum(getattr(one, name) for one in parts) for name in ("pairs", "missed", "dropped", "wrong")))


def show(documents: CandidateDocuments, found: Recall, least: float, console: Console) -> None:
    """Prints a table by source, the most similar missed pairs, and the least similar wrong drops."""
    title = f"Near-duplicate removal against brute force: pairs of at least {least:g} true similarity"
    table = Table(title=title, title_justify="left")
    for name in ("source", "pairs", "missed", "recall", "dropped as duplicates", "not similar", "precision"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for name, counts in [*sorted(found.by_source.items()), ("all", total(found))]:
        cells = [f"{counts.pairs:,}", f"{counts.missed:,}", _share(counts.recall)]
        table.add_row(name, *cells, f"{counts.dropped:,}", f"{counts.wrong:,}", _share(counts.precision))
    console.print(table)
    if found.missed:
        _say(console, f"\nmissed (both documents were kept), the most similar of {len(found.missed)}:")
    for one, other, value in found.missed[:_SHOWN]:
        _say(console, f"  {value:.4f}  {documents.ids[one]}  {documents.ids[other]}")
    if found.wrong:
        _say(
            console,
            f"\ndropped, but not similar enough to the document kept instead, the least similar of {len(found.wrong)}:",
        )
    survivors = {number: documents.survivors[documents.clusters[number]] for number in found.wrong}
    values = {one: jaccard(documents.grams[one], documents.grams[other]) for one, other in survivors.items()}
    for number in sorted(found.wrong, key=lambda number: (values[number], number))[:_SHOWN]:
        _say(console, f"  {values[number]:.4f}  {documents.ids[number]}  {documents.ids[survivors[number]]}")


def _share(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"


def _say(console: Console, line: str) -> None:
    say(line, console)


def main(argv: Sequence[str] | None = None) -> int:
    config, args = parse_args(
        DataConfig,
        argv,
        prog="trivium data recall",
        description="Measures recall and precision of a finished run's near-duplicate removal against brute force.",
        example="trivium data recall configs/data/demo.toml --similar 0.85",
        options=[
            ("--similar", str(SIMILAR), "the least true Jaccard similarity of near-duplicates, above 0 and up to 1")
        ],
    )
    try:
        least = float(args.similar)
    except ValueError:
        least = 0.0
    if not 0 < least <= 1:
        raise ConfigError(
            f"--similar {args.similar!r} is not a number above 0 and up to 1; give a similarity such as 0.8"
        )
    run_dir, console = Path(config.run.dir), wide_console()
    if args.dry_run:
        console.print(f"would compare the documents of {run_dir} that deduplication saw")
        return 0
    try:
        # The config of the run itself: the file may have changed since, in the n-grams for instance.
        path = run_dir / "config.toml"
        documents = documents_of(load(DataConfig, path) if path.is_file() else config, run_dir)
        show(documents, measure(documents, *similar_pairs(documents.grams, least)), least, console)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    entrypoint(main)
