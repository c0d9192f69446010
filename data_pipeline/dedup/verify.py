"""True Jaccard similarity of the pairs that MinHash proposes: which of them are near-duplicates indeed.

The n-grams of every document in a pair are hashed again and laid in files, sorted; then each group of documents that
share a key is gone through in their order, and a document joins the first one before it that it is similar to.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numba
import numpy as np
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.dedup.pairs import INDEXED, Numbering
from data_pipeline.scan.minhash import shingles
from data_pipeline.scan.words import Splitter
from data_pipeline.tables import kept_rows, read_table


@numba.njit(cache=True)
def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Of two ascending arrays without repetition."""
    common = i = j = 0
    while i < len(one) and j < len(other):
        if one[i] == other[j]:
            common += 1
            i += 1
            j += 1
        elif one[i] < other[j]:
            i += 1
        else:
            j += 1
    return common / max(len(one) + len(other) - common, 1)


class LayOutShingles(PipelineStep):
    """`<work>/<shard>.shingles.npy`, the candidates' n-gram hashes, and `.numbers.npy`, int64 [n, 2]: document, end."""

    name = "Shingles"
    type = "🫂 - DEDUPS"

    def __init__(
        self, work: str, filtered: str, pairs: Sequence[str], splitters: dict[str, Splitter], language: str, ngram: int
    ) -> None:
        super().__init__()
        self.work = work
        self.filtered = filtered
        self.pairs = list(pairs)
        self.splitters = splitters
        self.language = language
        self.ngram = ngram

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        documents = Numbering(self.filtered)
        wanted = np.zeros(documents.documents, bool)
        for path in self.pairs:
            pairs = np.load(path, mmap_mode="r")
            wanted[pairs[pairs[:, 0] != INDEXED].ravel()] = True
        for shard, members in groupby(data, key=lambda document: document.metadata["shard"]):
            place = documents.shards.index(shard)
            rules = _column(kept_rows(read_table(self.language, shard)), "row", "rules")
            hashes = [np.zeros(0, np.uint64)]
            ends: list[tuple[int, int]] = []
            for document in members:
                number = int(documents.numbers(place, np.array([document.metadata["row"]]))[0])
                if number == INDEXED or not wanted[number]:
                    continue
                window = self.splitters[rules[document.metadata["row"]]].window(self.ngram)
                hashes.append(np.unique(shingles(document.text, window)))
                ends.append((number, (ends[-1][1] if ends else 0) + len(hashes[-1])))
            path = Path(self.work) / shard
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path.with_name(path.name + ".shingles.npy"), np.concatenate(hashes))
            np.save(path.with_name(path.name + ".numbers.npy"), np.array(ends, np.int64).reshape(-1, 2))
        yield from ()


class Verify(PipelineStep):
    """Each file of pairs to `verified-` and its name, with the pairs of at least the given similarity."""

    name = "Jaccard"
    type = "🫂 - DEDUPS"

    def __init__(self, work: str, filtered: str, pairs: Sequence[str], least: float) -> None:
        super().__init__()
        self.work = work
        self.filtered = filtered
        self.pairs = list(pairs)
        self.least = least

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        documents = Numbering(self.filtered)
        for name in self.pairs[rank::world_size]:
            path = Path(name)
            pairs = np.load(path)
            held = pairs[pairs[:, 0] == INDEXED].tolist()
            for first, members in groupby(pairs[pairs[:, 0] != INDEXED].tolist(), key=lambda pair: pair[0]):
                kept = [(first, self._shingles(documents, first))]
                for _, number in members:
                    mine = self._shingles(documents, number)
                    for other, theirs in kept:
                        if jaccard(mine, theirs) >= self.least:
                            held.append([other, number])
                            break
                    else:
                        kept.append((number, mine))
            np.save(path.with_name(f"verified-{path.name}"), np.array(held, np.int64).reshape(-1, 2))
        yield from ()

    def _shingles(self, documents: Numbering, number: int) -> np.ndarray:
        shard = documents.shards[int(np.searchsorted(documents.starts, number, side="right")) - 1]
        numbers = np.load(Path(self.work) / f"{shard}.numbers.npy", mmap_mode="r")
        place = int(np.searchsorted(numbers[:, 0], number))
        start = int(numbers[place - 1, 1]) if place else 0
        return np.load(Path(self.work) / f"{shard}.shingles.npy", mmap_mode="r")[start : int(numbers[place, 1])]


def _column(table: object, key: str, value: str) -> dict:
    return dict(zip(table[key].to_pylist(), table[value].to_pylist(), strict=True))  # type: ignore[index]
