"""Packs documents that belong together, such as both sides of a pair, into the same row, and visits rows in epochs."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.mixture.packing import best_fit
from data_pipeline.mixture.rows import Row
from pretrain.data.batch_source import BatchSource, in_random_order, longest_in


@dataclass(frozen=True)
class Segment:
    """One document of a row: tokens [T], and for each position its label, whether it has a loss, and extra numbers."""

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    extra: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedRow(Row):
    """A row with further numbers [L] for each position, by name, which a loss finds in `Batch.extra`."""

    extra: Mapping[str, np.ndarray]


def pack(units: Sequence[Sequence[Segment]], seq_length: int, pad_id: int, source: int = 0) -> list[PackedRow]:
    """Packs units into rows of `seq_length` tokens. Segments of a unit follow one another in one row, in their order.

    All segments have the same names in `extra`. No unit may be longer than a row.
    """
    lengths = [sum(len(segment.tokens) for segment in unit) for unit in units]
    assert max(lengths, default=0) <= seq_length, "a unit is longer than a row"
    bins = best_fit(lengths, seq_length)
    return [_row([s for i in members for s in units[i]], seq_length, pad_id, source) for members in bins]


def _row(segments: Sequence[Segment], seq_length: int, pad_id: int, source: int) -> PackedRow:
    def joined(parts: Sequence[np.ndarray], fill: int, dtype: type) -> np.ndarray:
        whole: np.ndarray = np.full(seq_length, fill, dtype)
        used = np.concatenate(parts)
        whole[: len(used)] = used
        return whole

    lengths = [len(segment.tokens) for segment in segments]
    return PackedRow(
        tokens=joined([segment.tokens for segment in segments], pad_id, np.int64),
        labels=joined([segment.labels for segment in segments], 0, np.int64),
        loss_mask=joined([segment.loss_mask for segment in segments], 0, np.bool_),
        positions=joined([np.arange(length) for length in lengths], 0, np.int64),
        segments=joined([np.full(length, i) for i, length in enumerate(lengths)], -1, np.int64),
        source=source,
        extra={name: joined([s.extra[name] for s in segments], 0, np.float32) for name in segments[0].extra},
    )


class PackedSource(BatchSource):
    """Batch source of packed rows, in a new random order each epoch; it never ends.

    Sample i is a pure function of (rows, seed, i).
    """

    num_samples, reads_ahead = None, True

    def __init__(self, name: str, rows: Sequence[PackedRow], seed: int) -> None:
        self.sources, self.seed, self._rows = [name], seed, list(rows)
        self.longest_text = longest_in(self._rows)
        self.fingerprint = fingerprint(self._rows, seed)

    @property
    def facts(self) -> dict[str, str]:
        """Number and hash of the rows."""
        return {self.sources[0]: f"{len(self._rows)} rows ({self.fingerprint[:8]})"}

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows in one pass over the data."""
        return len(self._rows)

    def rows(self, samples: range) -> list[PackedRow]:
        """Returns the rows of `samples`, which count through all epochs."""
        return in_random_order(self._rows, samples, self.seed)


def fingerprint(rows: Sequence[PackedRow], seed: int) -> str:
    """Returns a hash of everything in the rows, in their order, and of the seed."""
    digest = hashlib.sha256(f"seed {seed}".encode())
    for row in rows:
        for array in (row.tokens, row.labels, row.loss_mask, row.segments, *row.extra.values()):
            digest.update(array.tobytes())
    return digest.hexdigest()
