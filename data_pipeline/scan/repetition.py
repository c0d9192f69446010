"""How much of a text repeats itself: equal lines, paragraphs and n-grams, counted by their hashes.

Gopher's measures (Rae et al. 2021, arXiv 2112.11446, table A1) in datatrove's reading: the most frequent
2-, 3- and 4-gram by the characters it covers, inner spaces included and the earliest winning a tie; repeated
5- to 10-grams by the characters of words covered by n-grams met before, left to right, no word counted twice.
An n-gram that is repeated starts with an (n-1)-gram that is repeated, so each size looks only at what the
size before left over. Words are never joined: "ab c" is not "a bc".
"""

import numba
import numpy as np

from data_pipeline.scan.words import BASE, mix


@numba.njit(cache=True, nogil=True)
def repeated_spans(hashes: np.ndarray, lengths: np.ndarray) -> tuple[int, int]:
    """(how many spans are equal to an earlier one, their characters)."""
    mask = _mask(len(hashes))
    keys, used = np.empty(mask + 1, np.uint64), np.zeros(mask + 1, np.bool_)
    spans = characters = 0
    for number in range(len(hashes)):
        slot = hashes[number] & np.uint64(mask)
        while used[slot] and keys[slot] != hashes[number]:
            slot = (slot + np.uint64(1)) & np.uint64(mask)
        if used[slot]:
            spans += 1
            characters += lengths[number]
        else:
            used[slot], keys[slot] = True, hashes[number]
    return spans, characters


@numba.njit(cache=True, nogil=True)
def ngram_scores(
    hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray, sizes: np.ndarray, tops: int, separator: int
) -> np.ndarray:
    """int64 [sizes]: characters of the most frequent n-gram for the first `tops` sizes, of repeated n-grams for
    the others. `sizes` ascend; `separator` is the width of what joins two words.
    """
    words = len(hashes)
    before = np.empty(words + 1, np.int64)  # characters of the words before each
    before[0] = 0
    for word in range(words):
        before[word + 1] = before[word] + ends[word] - starts[word]
    positions = np.arange(words)
    grams = hashes.copy()
    size, found = 1, np.zeros(len(sizes), np.int64)
    for number in range(len(sizes)):
        grams, positions = _lengthen(grams, positions, hashes, size, sizes[number])
        size = sizes[number]
        if words < size:
            break
        counts, first = _count(grams, positions)
        if number < tops:
            count, position = 1, 0
            for candidate in range(len(positions)):
                start = first[candidate]
                if counts[candidate] > count or (counts[candidate] == count and start < position):
                    count, position = counts[candidate], start
            found[number] = count * (before[position + size] - before[position] + separator * (size - 1))
        else:
            found[number] = _covered(grams, positions, counts, before, size)
        kept = 0
        for candidate in range(len(positions)):
            if counts[candidate] > 1:
                grams[kept], positions[kept] = grams[candidate], positions[candidate]
                kept += 1
        grams, positions = grams[:kept], positions[:kept]
    return found


@numba.njit(cache=True, nogil=True)
def _mask(entries: int) -> int:
    """Slots of an open table for so many entries, less one: a power of two, at most half full."""
    slots = 16
    while slots < 2 * entries:
        slots *= 2
    return slots - 1


@numba.njit(cache=True, nogil=True)
def _lengthen(
    grams: np.ndarray, positions: np.ndarray, hashes: np.ndarray, size: int, wanted: int
) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams at `positions`, from `size` words to `wanted`; those that the text ends in go.

    A polynomial in the words' hashes modulo 2^64.
    """
    kept = 0
    for candidate in range(len(positions)):
        position = positions[candidate]
        if position + wanted > len(hashes):
            break
        value = grams[candidate]
        for word in range(position + size, position + wanted):
            value = value * BASE + hashes[word]
        grams[kept], positions[kept] = value, position
        kept += 1
    return grams[:kept], positions[:kept]


@numba.njit(cache=True, nogil=True)
def _count(grams: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(how often each candidate's n-gram occurs, where it does first), int64 [candidates]."""
    mask = np.uint64(_mask(len(grams)))
    slots = np.full(mask + np.uint64(1), -1, np.int32)  # a slot's first candidate
    owner, tally = np.empty(len(grams), np.int32), np.zeros(len(grams), np.int32)
    for candidate in range(len(grams)):
        slot = mix(grams[candidate]) & mask
        while slots[slot] >= 0 and grams[slots[slot]] != grams[candidate]:
            slot = (slot + np.uint64(1)) & mask
        if slots[slot] < 0:
            slots[slot] = candidate
        owner[candidate] = slots[slot]
        tally[slots[slot]] += 1
    counts, first = np.empty(len(grams), np.int64), np.empty(len(grams), np.int64)
    for candidate in range(len(grams)):
        counts[candidate], first[candidate] = tally[owner[candidate]], positions[owner[candidate]]
    return counts, first


@numba.njit(cache=True, nogil=True)
def _covered(grams: np.ndarray, positions: np.ndarray, counts: np.ndarray, before: np.ndarray, size: int) -> int:
    """Characters of words in n-grams that were met before. Skipped over, an n-gram is not met."""
    mask = np.uint64(_mask(len(grams)))
    keys, used = np.empty(mask + np.uint64(1), np.uint64), np.zeros(mask + np.uint64(1), np.bool_)
    total = free_from = 0
    for candidate in range(len(grams)):
        position = positions[candidate]
        if counts[candidate] < 2 or position < free_from:
            continue
        value = grams[candidate]
        slot = mix(value) & mask
        while used[slot] and keys[slot] != value:
            slot = (slot + np.uint64(1)) & mask
        if used[slot]:
            total += before[position + size] - before[position]
            free_from = position + size
        else:
            used[slot], keys[slot] = True, value
    return total
