"""Rows of a source, epoch after epoch: documents are shuffled by (seed, source, epoch) and packed, then rows shuffled.

A plan that goes on from an earlier one may begin in the middle of an epoch. Its first rows are then made of the pieces
`left` of that epoch, packed for its own sequence length, so that the epoch still contains every token exactly once.
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
    """Parts of documents: tokens [start, start + length) of a document; int64 [pieces] each."""

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @classmethod
    def whole(cls, lengths: np.ndarray) -> "Pieces":
        """Returns one piece for each document, the whole document; `lengths` are in tokens."""
        return cls(np.arange(len(lengths)), np.zeros(len(lengths), np.int64), np.asarray(lengths, np.int64))

    def __len__(self) -> int:
        return len(self.document)

    def take(self, chosen: np.ndarray) -> "Pieces":
        """Returns the pieces with the given indices, in their order, or those that a boolean mask selects."""
        return Pieces(self.document[chosen], self.start[chosen], self.length[chosen])

    def without(self, used: "Pieces") -> "Pieces":
        """Returns the parts of these pieces that `used` does not cover; each used piece must lie within one of these.

        A remaining part begins where a piece begins or a used one ends, and ends where a used one begins or a piece
        ends; with both sorted, the n-th begin belongs to the n-th end.
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
    """The documents of a source and the settings from which its rows follow.

    `extra` are the positions, for each document, that every piece of it takes beyond its tokens: see `packing`.
    """

    name: str
    lengths: np.ndarray  # in tokens
    extra: np.ndarray
    seed: int
    seq_length: int
    packing: str
    epoch: int = 0  # the epoch in which the rows begin
    left: Pieces | None = None  # pieces of that epoch that are not used yet; None: all

    def whole(self, packing: str | None = None) -> Packed:
        """Packs one epoch in the documents' own order, by `packing` or, if it is None, by the plan's."""
        return PACKINGS[packing or self.packing](self.lengths, self.seq_length, self.extra)

    def size(self, number: int) -> int:
        """Returns the number of rows of an epoch; number 0 is the epoch in which the rows begin.

        All epochs have the same number, except one that is partly used; and under `concat`, if pieces take extra
        positions, the number depends on the order of documents.
        """
        if number == 0 and self.left is not None:
            return self._first_size
        if self.packing == "concat" and self.extra.any():
            return len(self._epoch(number))
        return self._size

    def begun(self) -> float:
        """Returns the number of epochs that earlier plans used; a partly used one counts by its share of tokens."""
        return self.epoch + self._first_used

    def most_rows(self, epochs: float) -> int:
        """Returns how many rows there are until `epochs` epochs, earlier plans included, are used; rounds down."""
        whole = math.floor(epochs)
        if whole < self.epoch:
            return 0
        used = self._first_used if whole == self.epoch else 0.0
        share = max(0.0, epochs - whole - used) / (1 - used)
        part = math.floor(share * self.size(whole - self.epoch) + 1e-9)  # 0.1 epochs of 30 rows are 3
        return sum(self.size(number) for number in range(whole - self.epoch)) + part

    def epochs_for(self, samples: int) -> int:
        """Returns the smallest whole number of epochs, earlier plans included, that allows `samples` more rows."""
        number = rows = 0
        while rows < samples:
            rows += self.size(number)
            number += 1
        return self.epoch + number

    def rows(self, samples: int) -> Packed:
        """Returns the source's first `samples` rows, epoch after epoch."""
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
        """Share of the first epoch's tokens that earlier plans used."""
        if self.left is None:
            return 0.0
        return 1 - int(self.left.length.sum()) / int(self.lengths.sum(dtype=np.int64))

    def _epoch(self, number: int) -> Packed:
        """Returns the rows of an epoch in the order of training; number 0 is the epoch in which the rows begin."""
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
        # Packing puts rows of one document, or of similar lengths, side by side; training must not see them in a run.
        return packed.take(generator(self.seed, self.name, epoch, "rows").permutation(len(packed)))


def joined(parts: list[Packed]) -> Packed:
    """Concatenates packed rows."""
    none = np.zeros(0, np.int64)
    ends = np.cumsum([0, *(int(part.offsets[-1]) for part in parts)])
    return Packed(
        np.concatenate([none, *(part.document for part in parts)]),
        np.concatenate([none, *(part.start for part in parts)]),
        np.concatenate([none, *(part.length for part in parts)]),
        np.concatenate([[0], *(part.offsets[1:] + end for part, end in zip(parts, ends, strict=False))]),
    )


def generator(seed: int, source: str, epoch: int, what: str) -> np.random.Generator:
    """Returns a random generator that depends on the arguments alone; `what` names the use, such as "rows"."""
    key = hashlib.sha256(json.dumps([seed, source, epoch, what]).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(key[:16], "little")))
