"""Faster BPE encoding: splits a text into parts, has sentencepiece encode each distinct part once, and joins the ids.

Two neighbouring characters that are neighbours in no piece of the vocabulary can never be merged. A text may therefore
be split between them and its parts encoded on their own; the ids are the same by construction. Parts are short and
repeat (Zipf's law), so nearly all of them are found in a table. This holds for BPE without dummy prefix and
normalisation, but not for Unigram, which scores whole sentences.
"""

from collections.abc import Callable, Sequence
from itertools import chain, pairwise

import numba
import numpy as np

from data_pipeline.scan.characters import codes_of
from data_pipeline.scan.words import mix, span_hash

_MOST_CODES = 1 << 24  # characters of all parts in the table; a fuller one is emptied
_SPACE, _MARK = 0x20, 0x2581  # pieces contain sentencepiece's mark U+2581 in place of a space

Encode = Callable[[list[str]], list[list[int]]]


class PartTable:
    """Cache of the ids of text parts; `encode` is called once for each distinct part."""

    def __init__(self, pieces: Sequence[str], encode: Encode) -> None:
        self._encode = encode
        self._neighbours = _neighbour_table(pieces)
        self._empty()

    def _empty(self) -> None:
        self._slots = np.full(1 << 16, -1, np.int32)
        self._parts = np.zeros((0, 4), np.int64)  # begin and end in _codes, begin and end in _ids
        self._codes = np.zeros(0, np.uint32)
        self._ids = np.zeros(0, np.int32)

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the int32 ids of each text; raises what `encode` raises for a part."""
        if not texts:
            return []
        codes = [codes_of(text) for text in texts]
        ends = np.cumsum([len(part) for part in codes])
        whole = np.concatenate(codes)
        starts = _cut(whole, ends, self._neighbours)
        found = _find(whole, starts, self._slots, self._parts, self._codes)
        if (found < 0).any():
            self._learn("".join(texts), whole, starts, found)
            found = _find(whole, starts, self._slots, self._parts, self._codes)
        sizes = self._parts[found, 3] - self._parts[found, 2]
        ids = _gather(found, self._parts, self._ids, int(sizes.sum()))
        # A text's parts are those that begin before its end.
        last = np.concatenate([[0], np.cumsum(sizes)])[np.searchsorted(starts[:-1], ends)]
        return np.split(ids, last[:-1])

    def _learn(self, text: str, whole: np.ndarray, starts: np.ndarray, found: np.ndarray) -> None:
        """Encodes the parts that are not in the table (`found` < 0) and adds them to it."""
        if len(self._codes) > _MOST_CODES:
            self._empty()
            found = np.full(len(found), -1)
        missing = _first_of_each(whole, starts, np.flatnonzero(found < 0))
        firsts, ends = starts[missing], starts[missing + 1]
        # Lists of int: slicing by NumPy integers takes several times as long.
        encoded = self._encode([text[first:end] for first, end in zip(firsts.tolist(), ends.tolist(), strict=True)])
        characters = np.cumsum(np.concatenate([[len(self._codes)], ends - firsts]))
        tokens = np.cumsum([len(self._ids), *map(len, encoded)])
        new = np.stack([characters[:-1], characters[1:], tokens[:-1], tokens[1:]], axis=1)
        self._parts = np.concatenate([self._parts, new])
        self._codes = np.concatenate([self._codes, _spans(whole, firsts, ends)])
        self._ids = np.concatenate([self._ids, np.fromiter(chain.from_iterable(encoded), np.int32)])
        size = len(self._slots)
        while size < 2 * len(self._parts):
            size *= 2
        self._slots = _slots(self._codes, self._parts, size)


def _neighbour_table(pieces: Sequence[str]) -> np.ndarray:
    """Returns a uint64 open-addressing table of (character << 32 | next character) in pieces; 0 marks a free slot."""
    pairs = {ord(one) << 32 | ord(other) for piece in pieces for one, other in pairwise(piece)}
    size = 1024
    while size < 4 * len(pairs):
        size *= 2
    table = np.zeros(size, np.uint64)
    for pair in pairs:
        slot = int(mix(np.uint64(pair))) & (size - 1)
        while table[slot]:
            slot = (slot + 1) & (size - 1)
        table[slot] = pair
    return table


@numba.njit(cache=True, nogil=True)
def _cut(codes: np.ndarray, ends: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Returns int64 [parts + 1]: the begin of each part, then the end of the last. Each of `ends` ends a text."""
    starts = np.empty(len(codes) + 1, np.int64)
    mask = np.uint64(len(neighbours) - 1)
    count = text = 0
    before = np.uint64(0)
    for position in range(len(codes)):
        while text < len(ends) and ends[text] < position:
            text += 1
        code = np.uint64(_MARK if codes[position] == _SPACE else codes[position])
        joined = False
        if position > 0 and not (text < len(ends) and ends[text] == position):
            pair = before << np.uint64(32) | code
            slot = mix(pair) & mask
            while neighbours[slot] != 0 and neighbours[slot] != pair:
                slot = (slot + np.uint64(1)) & mask
            joined = neighbours[slot] == pair
        if not joined:
            starts[count] = position
            count += 1
        before = code
    starts[count] = len(codes)
    return starts[: count + 1]


@numba.njit(cache=True, nogil=True)
def _find(codes: np.ndarray, starts: np.ndarray, slots: np.ndarray, parts: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns int64 [parts], the index of each part in the table, or -1; compares characters, not only hashes."""
    mask = np.uint64(len(slots) - 1)
    found = np.empty(len(starts) - 1, np.int64)
    for part in range(len(found)):
        start, end = starts[part], starts[part + 1]
        slot = span_hash(codes, start, end) & mask
        entry = slots[slot]
        while entry >= 0 and not _same(codes, start, end, known, parts[entry, 0], parts[entry, 1]):
            slot = (slot + np.uint64(1)) & mask
            entry = slots[slot]
        found[part] = entry
    return found


@numba.njit(cache=True, nogil=True)
def _same(codes: np.ndarray, start: int, end: int, known: np.ndarray, first: int, last: int) -> bool:
    """Whether codes[start:end] equals known[first:last]."""
    if end - start != last - first:
        return False
    same = True
    for position in range(end - start):
        same &= codes[start + position] == known[first + position]
    return same


@numba.njit(cache=True, nogil=True)
def _first_of_each(codes: np.ndarray, starts: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Returns those of the `chosen` parts of a text (by index) whose characters no earlier chosen part has."""
    size = 1024
    while size < 2 * len(chosen):
        size *= 2
    slots, mask = np.full(size, -1, np.int64), np.uint64(size - 1)
    kept = np.empty(len(chosen), np.int64)
    count = 0
    for part in chosen:
        start, end = starts[part], starts[part + 1]
        slot = span_hash(codes, start, end) & mask
        while slots[slot] >= 0 and not _same(codes, start, end, codes, starts[slots[slot]], starts[slots[slot] + 1]):
            slot = (slot + np.uint64(1)) & mask
        if slots[slot] < 0:
            slots[slot] = part
            kept[count] = part
            count += 1
    return kept[:count]


@numba.njit(cache=True, nogil=True)
def _slots(known: np.ndarray, parts: np.ndarray, size: int) -> np.ndarray:
    """Returns int32 [size], an open-addressing table of the indices of all known parts; -1 marks a free slot."""
    slots = np.full(size, -1, np.int32)
    mask = np.uint64(size - 1)
    for entry in range(len(parts)):
        slot = span_hash(known, parts[entry, 0], parts[entry, 1]) & mask
        while slots[slot] >= 0:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = entry
    return slots


@numba.njit(cache=True, nogil=True)
def _spans(codes: np.ndarray, firsts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the characters of all spans, concatenated."""
    joined = np.empty((ends - firsts).sum(), np.uint32)
    position = 0
    for span in range(len(firsts)):
        for code in range(firsts[span], ends[span]):
            joined[position] = codes[code]
            position += 1
    return joined


@numba.njit(cache=True, nogil=True)
def _gather(found: np.ndarray, parts: np.ndarray, ids: np.ndarray, total: int) -> np.ndarray:
    """Returns the `total` ids of the parts `found`, concatenated."""
    gathered = np.empty(total, np.int32)
    position = 0
    for entry in found:
        for token in range(parts[entry, 2], parts[entry, 3]):
            gathered[position] = ids[token]
            position += 1
    return gathered
