"""Exact deduplication of substrings: what has occurred before, for `min_bytes` or more, is cut.

The definition is that of Lee et al. 2022 (arXiv 2107.06499), with the first occurrence kept: a window of `min_bytes`
bytes is a repeat if an equal one begins earlier, in the order of source, shard, row and offset, and does not overlap
it; the cut is the union of repeats, which is that of all longer repeated substrings too. Its ends move inwards to
whole characters. Windows do not reach over the ends of documents. A first occurrence can itself be cut in part,
where it overlaps with a repeat of something else: so it is in the paper.

They build a suffix array over the whole corpus. The same windows are found here without holding it in memory:
1. Of every window take its minimizer, the least hash of the windows of half its length within (Roberts et al. 2004).
   Equal windows have the same one, and one in about 50 positions is new. Those are counted (see `copies`).
2. Only windows whose minimizer occurs again can be repeats: these are counted by their 128-bit BLAKE2b digests.
3. What a shard may not keep is cut.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numba
import numpy as np
from datatrove.data import Document

from configs.cuts import SubstringsConfig
from data_pipeline.canaries.naming import salt, source_of
from data_pipeline.cutting.copies import DIGEST, Quota, TextUnits
from data_pipeline.cutting.cuts import Cut, CutStep
from data_pipeline.scan.words import mix

_BLOCK = 1 << 18  # windows looked at together: some 20 MB of arrays
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64


class Minimizers(TextUnits):
    """The minimizers of a text's windows, one for each run of windows that share it."""

    def __init__(self, settings: SubstringsConfig) -> None:
        self.settings = settings
        self.inner = settings.min_bytes // 2
        self.width = settings.min_bytes - self.inner + 1  # inner windows in a window
        self._tables: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def takes(self, source: str) -> bool:
        return self.settings.sources is None or source_of(source) in self.settings.sources

    def blocks(self, raw: bytes) -> Iterator[tuple[int, np.ndarray]]:
        """(first window, uint64 minimizer of each window from there) in blocks."""
        codes = np.frombuffer(raw, np.uint8)
        windows = len(codes) - self.settings.min_bytes + 1
        for start in range(0, max(windows, 0), _BLOCK):
            stretch = codes[start : start + _BLOCK + self.settings.min_bytes - 1]
            yield start, _sliding_minimum(_mixed(self._hashes(stretch)), self.width)

    def _hashes(self, codes: np.ndarray) -> np.ndarray:
        """uint64, a polynomial modulo 2^64 of each window of `inner` bytes. Collisions cost time, not truth."""
        if self._tables is None:  # in the worker: too large to travel
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
            # One inner window is the least of `width` windows at most: a longer run holds it twice.
            found.append(_as_digests(np.repeat(minimizers[edges], 1 + (lengths > self.width)), shard))
        return np.concatenate(found)


class Windows(TextUnits):
    """The windows of a text whose minimizers occur again, by their content. `repeated`: quotas of minimizers."""

    def __init__(self, settings: SubstringsConfig, repeated: str, shards: Sequence[str]) -> None:
        self.minimizers = Minimizers(settings)
        self.repeated = repeated
        self.shards = list(shards)
        self._quota: tuple[str, Quota | None] = ("", None)

    def counted(self, text: str, source: str, shard: str) -> tuple[np.ndarray, np.ndarray]:
        """(int64 first bytes, DIGESTs)."""
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
    """Cuts the windows that a shard may not keep; `quotas` says which."""

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
        # A unit that this shard may keep has its first occurrence in this very document.
        repeats = (quota.left[indices] == 0) | (starts >= starts[first][unit] + size)
        quota.left[units] = 0
        spans = _spans(document.text, starts[repeats], size)
        return [Cut(start, end, "", "duplicate_substring") for start, end in spans], {}


def _spans(text: str, starts: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """The union of windows, in bytes, without the parts of characters at its ends."""
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
    """uint64 [size], base ** 0, 1, 2... modulo 2^64."""
    factors = np.full(size, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _sliding_minimum(values: np.ndarray, width: int) -> np.ndarray:
    """The least of each `width` neighbours, by running minima of blocks from either side (van Herk 1992)."""
    count = len(values) - width + 1
    padded = np.full(-(-len(values) // width) * width, np.iinfo(np.uint64).max, np.uint64)
    padded[: len(values)] = values
    blocks = padded.reshape(-1, width)
    ahead = np.minimum.accumulate(blocks, axis=1).ravel()
    behind = np.minimum.accumulate(blocks[:, ::-1], axis=1)[:, ::-1].ravel()
    return np.minimum(behind[:count], ahead[width - 1 : width - 1 + count])


def _as_digests(values: np.ndarray, shard: str) -> np.ndarray:
    """64-bit numbers as DIGESTs. Mixed first: minima are all small, and partitions go by the first bits."""
    return (_mixed(values) ^ np.uint64(salt(shard))).astype(">u8").view("S8").astype(DIGEST)
