"""Measures of repetition in a text: equal lines, paragraphs and n-grams, counted by their hashes.

The measures are Gopher's (Rae et al. 2021, arXiv 2112.11446, table A1). For 2-, 3- and 4-grams: the characters covered
by the most frequent one, with the spaces inside; of equally frequent ones the earliest counts. For 5- to 10-grams: the
characters of the words covered by n-grams that occurred before, from left to right, no word counted twice.

In `ngram_scores` two n-grams are equal if their words are: "ab c" differs from "a bc". A repeated n-gram then begins
with a repeated (n-1)-gram, so each size looks only at the candidates that the size before has left. In
`joined_duplicates` they are equal if their words, joined without spaces, are equal, as datatrove counts 5- to 10-grams:
the rules ". ..." and "... ." of a table of contents, or the two halves of a dashed line, repeat each other there.
"""

import numba
import numpy as np

from data_pipeline.scan.words import BASE, mix


@numba.njit(cache=True, nogil=True)
def repeated_spans(hashes: np.ndarray, lengths: np.ndarray) -> tuple[int, int]:
    """Returns (number of spans equal to an earlier one, characters of these), by hashes and lengths of the spans."""
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
    """Returns, for each n-gram size, the characters that repetition covers, int64 [sizes].

    For the first `tops` sizes these are the characters of all occurrences of the most frequent n-gram, for the others
    those of repeated n-grams. `sizes` ascend; `separator` is the number of characters between two words.
    """
    words = len(hashes)
    before = np.empty(words + 1, np.int64)  # before[n]: characters of the first n words
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
def joined_duplicates(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Returns, for each n-gram size, the characters of repeated n-grams, int64 [sizes], where n-grams are compared
    without the spaces between their words.

    `starts` and `ends` are the words in the code points `codes`; `sizes` ascend. The hash of a joined n-gram is a
    polynomial in its code points, modulo 2^64, which needs the word's own polynomial and power of the base to grow by a
    word.
    """
    words = len(starts)
    values, powers = np.empty(words, np.uint64), np.empty(words, np.uint64)
    before = np.empty(words + 1, np.int64)  # before[n]: characters of the first n words
    before[0] = 0
    for word in range(words):
        value, power = np.uint64(0), np.uint64(1)
        for position in range(starts[word], ends[word]):
            value = value * BASE + np.uint64(codes[position]) + np.uint64(1)
            power *= BASE
        values[word], powers[word] = value, power
        before[word + 1] = before[word] + ends[word] - starts[word]
    grams = values.copy()
    size, found = 1, np.zeros(len(sizes), np.int64)
    for number in range(len(sizes)):
        grams = grams[: max(words - sizes[number] + 1, 0)]
        for position in range(len(grams)):
            for word in range(position + size, position + sizes[number]):
                grams[position] = grams[position] * powers[word] + values[word]
        size = sizes[number]
        found[number] = _covered(grams, np.arange(len(grams)), np.full(len(grams), 2), before, size)
    return found


@numba.njit(cache=True, nogil=True)
def _mask(entries: int) -> int:
    """Returns the number of slots of a hash table for `entries`, minus one; a power of two slots, at most half full."""
    slots = 16
    while slots < 2 * entries:
        slots *= 2
    return slots - 1


@numba.njit(cache=True, nogil=True)
def _lengthen(
    grams: np.ndarray, positions: np.ndarray, hashes: np.ndarray, size: int, wanted: int
) -> tuple[np.ndarray, np.ndarray]:
    """Extends the n-grams at `positions` from `size` to `wanted` words; drops those beyond the end of the text.

    An n-gram's hash is a polynomial in its words' hashes, modulo 2^64. The arrays are changed in place.
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
    """Returns (occurrences of each candidate's n-gram, position of the first one), each int64 [candidates]."""
    mask = np.uint64(_mask(len(grams)))
    slots = np.full(mask + np.uint64(1), -1, np.int32)  # the first candidate of the n-gram in each slot
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
    """Returns the characters of the words covered by n-grams that occurred before; skips n-grams that occur once.

    After a covered n-gram the scan goes on behind it; the n-grams that it skips do not count as occurrences.
    """
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
