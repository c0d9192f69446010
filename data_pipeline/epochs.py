"""A source's rows, epoch after epoch: documents shuffled by (seed, source, epoch), packed, and the rows shuffled."""

import functools
import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np

from data_pipeline.packing import PACKINGS, Packed


@dataclass(frozen=True)
class Documents:
    """What a source's rows are made of. `extra` are the positions beside each piece of a document: see `packing`."""

    name: str
    lengths: np.ndarray  # in tokens
    extra: np.ndarray
    seed: int
    seq_length: int
    packing: str

    def whole(self, packing: str | None = None) -> Packed:
        """One epoch in the documents' own order."""
        return PACKINGS[packing or self.packing](self.lengths, self.seq_length, self.extra)

    def size(self, epoch: int) -> int:
        """Rows of an epoch. The same in all, but where concat cuts elsewhere and pieces take extra positions."""
        if self.packing == "concat" and self.extra.any():
            return len(self._epoch(epoch))
        return self._size

    def most_rows(self, epochs: float) -> int:
        """How many rows there are in so many epochs; of a part of an epoch, whole rows."""
        whole = math.floor(epochs)
        part = math.floor((epochs - whole) * self.size(whole) + 1e-9)  # 0.1 epochs of 30 rows are 3
        return sum(self.size(epoch) for epoch in range(whole)) + part

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

    def _epoch(self, epoch: int) -> Packed:
        order = generator(self.seed, self.name, epoch, "documents").permutation(len(self.lengths))
        packed = PACKINGS[self.packing](self.lengths[order], self.seq_length, self.extra[order])
        packed = Packed(order[packed.document], packed.start, packed.length, packed.offsets)
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
