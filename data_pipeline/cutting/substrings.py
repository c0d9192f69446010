"""Exact deduplication of substrings: cuts every substring of at least `min_bytes` bytes that occurred before.

The definition is that of Lee et al. 2022 (arXiv 2107.06499), with the first occurrence kept: a window of `min_bytes`
bytes is a repeat if an equal one begins earlier, in the order of source, shard, row and offset, and does not overlap
it. The cuts are the union of all repeats, which covers longer repeated substrings too; their ends move inwards to whole
characters. Windows do not cross the ends of documents. As in the paper, a first occurrence can itself be cut in part,
where it overlaps with a repeat of something else.

The paper builds a suffix array over the whole corpus. The same windows are found here without holding it in memory:
1. The minimizer of a window is the smallest hash of all windows of half its length inside it (Roberts et al. 2004).
   Equal windows have the same minimizer, which changes about every 50 positions. Minimizers are counted (see `copies`).
2. Only windows whose minimizer occurs again can be repeats. These are counted by their 128-bit BLAKE2b digests.
3. Windows that a shard may not keep are cut.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numba
import numpy as np
from datatrove.data import Document

from configs.cuts import SubstringsConfig
from data_pipeline.core.canary_naming import salt, source_of
from data_pipeline.cutting.copies import DIGEST, Quota, TextUnits
from data_pipeline.cutting.cuts import Cut, CutStep
from data_pipeline.scan.words import mix

_BLOCK = 1 << 18  # windows processed at a time, in some 20 MB of arrays
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64


class Minimizers(TextUnits):
    """Computes the minimizers of a text's windows, one for each run of windows that share it."""

    def __init__(self, settings: SubstringsConfig) -> None:
        self.settings = settings
        self.inner = settings.min_bytes // 2
        self.width = settings.min_bytes - self.inner + 1  # inner windows in a window
        self._tables: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def takes(self, source: str) -> bool:
        """Whether a source is deduplicated."""
        return self.settings.sources is None or source_of(source) in self.settings.sources

    def blocks(self, raw: bytes) -> Iterator[tuple[int, np.ndarray]]:
        """Yields blocks of windows: (index of the first window, minimizer of each window, uint64)."""
        codes = np.frombuffer(raw, np.uint8)
        windows = len(codes) - self.settings.min_bytes + 1
        for start in range(0, max(windows, 0), _BLOCK):
            block = codes[start : start + _BLOCK + self.settings.min_bytes - 1]
            yield start, _sliding_minimum(_mixed(self._hashes(block)), self.width)

    def _hashes(self, codes: np.ndarray) -> np.ndarray:
        """Hashes each window of `inner` bytes, uint64. A collision costs time but does not change the result."""
        if self._tables is None:  # made in the worker, since they are too large to be sent
            size = _BLOCK + self.settings.min_bytes
            drawn = _mixed(np.arange(1, 257, dtype=np.uint64))  # a random number for each byte
            self._tables = drawn, _powers(_BASE, size), _powers(pow(_BASE, -1, 1 << 64), size)
        drawn, up, down = self._tables
        sums = np.zeros(len(codes) + 1, np.uint64)
        np.cumsum(drawn[codes] * up[: len(codes)], out=sums[1:])
        windows = sums[self.inner :] - sums[: -self.inner]
        return windows * down[: len(windows)]

    def digests(self, text: str, source: str, shard: str) -> np.ndarray:
        if not self.takes(source):
            return np.zeros(0, DIGEST)
        found = [np.zeros(0, DIGEST)]
        for _, minimizers in self.blocks(text.encode()):
            edges = np.flatnonzero(np.r_[True, minimizers[1:] != minimizers[:-1]])
            lengths = np.diff(np.r_[edges, len(minimizers)])
            # One inner window can be the minimizer of at most `width` windows; a longer run has two equal ones.
            found.append(_as_digests(np.repeat(minimizers[edges], 1 + (lengths > self.width)), shard))
        return np.concatenate(found)


class Windows(TextUnits):
    """Selects the windows of a text whose minimizers occur again, and computes digests of their bytes.

    `repeated` is the folder with the quotas of minimizers.
    """

    def __init__(self, settings: SubstringsConfig, repeated: str, shards: Sequence[str]) -> None:
        self.minimizers = Minimizers(settings)
        self.repeated = repeated
        self.shards = list(shards)
        self._quota: tuple[str, Quota | None] = ("", None)

    def counted(self, text: str, source: str, shard: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (int64, the offsets of the selected windows in bytes; their DIGESTs)."""
        if self._quota[0] != shard:
            self._quota = shard, Quota(self.repeated, self.shards.index(shard))
        quota = self._quota[1]
        starts, digests = [np.zeros(0, np.int64)], [np.zeros(0, DIGEST)]
        if quota is not None and len(quota.digests) and self.minimizers.takes(source):
            raw = text.encode()
            for first, minimizers in self.minimizers.blocks(raw):
                edges = np.flatnonzero(np.r_[True, minimizers[1:] != minimizers[:-1]])
                again = quota.indices(_as_digests(minimizers[edges], shard)) >= 0
                chosen = first + np.flatnonzero(np.repeat(again, np.diff(np.r_[edges, len(minimizers)])))
                starts.append(chosen)
                digests.append(self._contents(raw, chosen, shard))
        return np.concatenate(starts), np.concatenate(digests)

    def _contents(self, raw: bytes, starts: np.ndarray, shard: str) -> np.ndarray:
        view, size, digest = memoryview(raw), self.minimizers.settings.min_bytes, hashlib.blake2b
        own = salt(shard).to_bytes(16, "little")
        contents = b"".join(
            [digest(view[start : start + size], digest_size=16, salt=own).digest() for start in starts.tolist()]
        )
        return np.frombuffer(contents, DIGEST)

    def digests(self, text: str, source: str, shard: str) -> np.ndarray:
        return self.counted(text, source, shard)[1]


class CutSubstrings(CutStep):
    """Step that cuts the windows that a shard may not keep; `quotas` is the folder of quotas."""

    name = "Substrings"

    def __init__(self, folder: str, tallies: str, select: str, windows: Windows, quotas: str) -> None:
        super().__init__(folder, tallies, select)
        self.windows = windows
        self.quotas = quotas
        self._quota: Quota | None = None

    def open_shard(self, shard: str) -> None:
        self._quota = Quota(self.quotas, self.windows.shards.index(shard))

    def find(self, document: Document) -> tuple[list[Cut], dict[str, Any]]:
        quota = self._quota
        assert quota is not None
        metadata = document.metadata
        starts, digests = self.windows.counted(document.text, metadata["source"], metadata["shard"])
        indices = quota.indices(digests)
        starts, indices = starts[indices >= 0], indices[indices >= 0]
        size = self.windows.minimizers.settings.min_bytes
        units, first, unit = np.unique(indices, return_index=True, return_inverse=True)
        # If the shard may keep a window, its first occurrence here is the one to keep; a later one that does not
        # overlap it is a repeat.
        repeats = (quota.left[indices] == 0) | (starts >= starts[first][unit] + size)
        quota.left[units] = 0
        spans = _spans(document.text, starts[repeats], size)
        return [Cut(start, end, "", "duplicate_substring") for start, end in spans], {}


def _spans(text: str, starts: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Yields the union of windows as spans in bytes, whose ends move inwards to whole characters."""
    if not len(starts):
        return
    heads = np.flatnonzero(np.r_[True, np.diff(starts) > size])
    raw = text.encode()
    for start, last in zip(starts[heads].tolist(), starts[np.r_[heads[1:], len(starts)] - 1].tolist(), strict=True):
        end = last + size
        while start < end and raw[start] & 0xC0 == 0x80:
            start += 1
        while end < len(raw) and raw[end] & 0xC0 == 0x80:
            end -= 1
        if start < end:
            yield start, end


@numba.njit(cache=True, nogil=True)
def _mixed(values: np.ndarray) -> np.ndarray:
    mixed = np.empty(len(values), np.uint64)
    for index in range(len(values)):
        mixed[index] = mix(values[index])
    return mixed


def _powers(base: int, size: int) -> np.ndarray:
    """Powers base ** 0, 1, 2, ... modulo 2^64, uint64 [size]."""
    factors = np.full(size, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _sliding_minimum(values: np.ndarray, width: int) -> np.ndarray:
    """Minimum of every `width` values in a row, by running minima of blocks from both sides (van Herk 1992)."""
    count = len(values) - width + 1
    padded = np.full(-(-len(values) // width) * width, np.iinfo(np.uint64).max, np.uint64)
    padded[: len(values)] = values
    blocks = padded.reshape(-1, width)
    ahead = np.minimum.accumulate(blocks, axis=1).ravel()
    behind = np.minimum.accumulate(blocks[:, ::-1], axis=1)[:, ::-1].ravel()
    return np.minimum(behind[:count], ahead[width - 1 : width - 1 + count])


def _as_digests(values: np.ndarray, shard: str) -> np.ndarray:
    """Turns 64-bit minimizers into DIGESTs; mixed, since minima are small and first bits choose the partition."""
    return (_mixed(values) ^ np.uint64(salt(shard))).astype(">u8").view("S8").astype(DIGEST)
