"""A source's rows, epoch after epoch: documents shuffled by (seed, source, epoch), packed, and the rows shuffled.

A plan may begin in the middle of an epoch, where an earlier one ended: its first rows are then made of what is `left`
of that epoch, cut and packed for its own sequence length, so that the epoch still has every token exactly once.
"""

import functools
import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np

from data_pipeline.mixture.packing import PACKINGS, Packed


@dataclass(frozen=True)
class Pieces:
    """Parts of documents: tokens [start, start + length) of document. int64 [pieces] each, by document and start."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @classmethod
    def whole(cls, lengths: np.ndarray) -> "Pieces":
        return cls(np.arange(len(lengths)), np.zeros(len(lengths), np.int64), np.asarray(lengths, np.int64))

    def __len__(self) -> int:
        return len(self.document)

    def take(self, chosen: np.ndarray) -> "Pieces":
        """The given ones, in the given order; or those of a mask."""
        return Pieces(self.document[chosen], self.start[chosen], self.length[chosen])

    def without(self, used: "Pieces") -> "Pieces":
        """What is left when `used`, in any order, is cut out. Each of them lies within one piece of these.

        What is left begins where a piece begins or a used one ends, and ends where a used one begins or a piece ends;
        sorted, the n-th beginning belongs to the n-th end.
        """
        documents = np.concatenate([self.document, used.document])
        begins = np.concatenate([self.start, used.start + used.length])
        ends = np.concatenate([self.start + self.length, used.start])
        by_begin, by_end = np.lexsort((begins, documents)), np.lexsort((ends, documents))
        start = begins[by_begin]
        length = ends[by_end] - start
        return Pieces(documents[by_begin], start, length).take(length > 0)


@dataclass(frozen=True)
class SourceEpochs:
    """What a source's rows are made of. `extra` are the positions beside each piece of a document: see `packing`."""

    name: str
    lengths: np.ndarray  # in tokens
    extra: np.ndarray
    seed: int
    seq_length: int
    packing: str
    epoch: int = 0  # that the rows begin in
    left: Pieces | None = None  # of that epoch; None: all

    def whole(self, packing: str | None = None) -> Packed:
        """One epoch in the documents' own order."""
        return PACKINGS[packing or self.packing](self.lengths, self.seq_length, self.extra)

    def size(self, number: int) -> int:
        """Rows of an epoch, counted from the one that the rows begin in.

        The same in all, but where only a part is left, and where concat cuts elsewhere and pieces take extra positions.
        """
        if number == 0 and self.left is not None:
            return self._first_size
        if self.packing == "concat" and self.extra.any():
            return len(self._epoch(number))
        return self._size

    def begun(self) -> float:
        """Epochs that earlier plans used, a part of one by its tokens."""
        return self.epoch + self._first_used

    def most_rows(self, epochs: float) -> int:
        """How many rows there are until so many epochs are over; of a part of an epoch, whole rows."""
        whole = math.floor(epochs)
        if whole < self.epoch:
            return 0
        used = self._first_used if whole == self.epoch else 0.0
        share = max(0.0, epochs - whole - used) / (1 - used)
        part = math.floor(share * self.size(whole - self.epoch) + 1e-9)  # 0.1 epochs of 30 rows are 3
        return sum(self.size(number) for number in range(whole - self.epoch)) + part

    def epochs_for(self, samples: int) -> int:
        """The lowest cap, in whole epochs, that allows so many rows."""
        number = rows = 0
        while rows < samples:
            rows += self.size(number)
            number += 1
        return self.epoch + number

    def rows(self, samples: int) -> Packed:
        """The first `samples` rows of the epochs."""
        parts: list[Packed] = []
        missing = samples
        while missing:
            part = self._epoch(len(parts))
            parts.append(part.take(np.arange(min(missing, len(part)))))
            missing -= len(parts[-1])
        return joined(parts)

    @functools.cached_property
    def _size(self) -> int:
        return len(self.whole())

    @functools.cached_property
    def _first_size(self) -> int:
        return len(self._epoch(0))

    @functools.cached_property
    def _first_used(self) -> float:
        """The share of the first epoch's tokens that earlier plans had."""
        if self.left is None:
            return 0.0
        return 1 - int(self.left.length.sum()) / int(self.lengths.sum(dtype=np.int64))

    def _epoch(self, number: int) -> Packed:
        pieces = self.left if number == 0 and self.left is not None else Pieces.whole(self.lengths)
        epoch = self.epoch + number
        pieces = pieces.take(generator(self.seed, self.name, epoch, "documents").permutation(len(pieces)))
        packed = PACKINGS[self.packing](pieces.length, self.seq_length, self.extra[pieces.document])
        packed = Packed(
            pieces.document[packed.document],
            pieces.start[packed.document] + packed.start,
            packed.length,
            packed.offsets,
        )
        # Neighbouring rows are of one document or of like lengths: training must not see them in a run.
        return packed.take(generator(self.seed, self.name, epoch, "rows").permutation(len(packed)))


def joined(parts: list[Packed]) -> Packed:
    """Rows after rows."""
    none = np.zeros(0, np.int64)
    ends = np.cumsum([0, *(int(part.offsets[-1]) for part in parts)])
    return Packed(
        np.concatenate([none, *(part.document for part in parts)]),
        np.concatenate([none, *(part.start for part in parts)]),
        np.concatenate([none, *(part.length for part in parts)]),
        np.concatenate([[0], *(part.offsets[1:] + end for part, end in zip(parts, ends, strict=False))]),
    )


def generator(seed: int, source: str, epoch: int, what: str) -> np.random.Generator:
    key = hashlib.sha256(json.dumps([seed, source, epoch, what]).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))
