"""Lines, paragraphs and characters of a text: how lines begin and end, how long they are, which are repeated.

A line is meant in one of three ways, as in the rules' sources: Gopher's bullets and ellipses by
`str.splitlines`, FineWeb's rules by "\\n" and without blank lines, Gopher's repetition by "\\n+" and paragraphs
by "\\n{2,}". White space is `str.isspace`.
"""

import numba
import numpy as np

from data_pipeline.scan.characters import ALNUM, BREAK, SPACE, TERMINAL
from data_pipeline.scan.repetition import repeated_spans
from data_pipeline.scan.words import span_hash

SHORT_LINE = 30  # characters, FineWeb
_NEWLINE, _RETURN, _HASH, _DOT, _ELLIPSIS, _DASH, _BULLET = 0x0A, 0x0D, 0x23, 0x2E, 0x2026, 0x2D, 0x2022


@numba.njit(cache=True, nogil=True)
def lines_of(codes: np.ndarray, kinds: np.ndarray, any_break: bool) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends), int32 [lines]: of `str.splitlines()`, or of `split("\\n")` without `any_break`."""
    count = 1
    for kind in kinds:
        count += (kind & BREAK) != 0
    starts, ends = np.empty(count, np.int32), np.empty(count, np.int32)
    number = start = 0
    for position in range(len(codes)):
        if not kinds[position] & BREAK or (codes[position] != _NEWLINE and not any_break):
            continue
        if any_break and codes[position] == _NEWLINE and position > 0 and codes[position - 1] == _RETURN:
            start = position + 1  # \r\n has ended its line already
            continue
        starts[number], ends[number] = start, position
        number += 1
        start = position + 1
    if start < len(codes) or not any_break:
        starts[number], ends[number] = start, len(codes)
        number += 1
    return starts[:number], ends[:number]


@numba.njit(cache=True, nogil=True)
def trim(codes: np.ndarray, kinds: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """The span without white space around it."""
    while start < end and kinds[start] & SPACE:
        start += 1
    while start < end and kinds[end - 1] & SPACE:
        end -= 1
    return start, end


@numba.njit(cache=True, nogil=True)
def ends_in_ellipsis(codes: np.ndarray, start: int, end: int) -> bool:
    if end > start and codes[end - 1] == _ELLIPSIS:
        return True
    return end - start >= 3 and codes[end - 1] == _DOT and codes[end - 2] == _DOT and codes[end - 3] == _DOT


@numba.njit(cache=True, nogil=True)
def gopher_lines(codes: np.ndarray, kinds: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[int, int]:
    """(lines that begin with a bullet, lines that end in an ellipsis)."""
    bullets = ellipses = 0
    for line in range(len(starts)):
        start, end = trim(codes, kinds, starts[line], ends[line])
        if start < end:
            bullets += codes[start] == _BULLET or codes[start] == _DASH
            ellipses += ends_in_ellipsis(codes, start, end)
    return bullets, ellipses


@numba.njit(cache=True, nogil=True)
def fineweb_lines(
    codes: np.ndarray, kinds: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[int, int, int, int, int, int]:
    """Of the lines that are not blank: (their number, how many end in terminal punctuation, how many are short,
    characters of those equal to an earlier one, all their characters, the longest one's).
    """
    hashes, lengths = np.empty(len(starts), np.uint64), np.empty(len(starts), np.int64)
    count = terminal = short = total = longest = 0
    for line in range(len(starts)):
        start, end = starts[line], ends[line]
        first, last = trim(codes, kinds, start, end)
        if first == last:
            continue
        length = end - start
        hashes[count], lengths[count] = span_hash(codes, start, end), length
        count += 1
        terminal += (kinds[end - 1] & TERMINAL) != 0
        short += length <= SHORT_LINE
        total += length
        longest = max(longest, length)
    return count, terminal, short, repeated_spans(hashes[:count], lengths[:count])[1], total, longest


@numba.njit(cache=True, nogil=True)
def gopher_duplicates(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[int, int, int]:
    """(lines equal to an earlier one, their characters, lines) of the pieces that "\\n+" leaves.

    `starts` and `ends` are of `split("\\n")`: empty pieces count at the text's very begin and end alone.
    """
    hashes, lengths = np.empty(len(starts), np.uint64), np.empty(len(starts), np.int64)
    count = 0
    for line in range(len(starts)):
        if ends[line] > starts[line] or line == 0 or (line == len(starts) - 1):
            hashes[count], lengths[count] = span_hash(codes, starts[line], ends[line]), ends[line] - starts[line]
            count += 1
    spans, characters = repeated_spans(hashes[:count], lengths[:count])
    return spans, characters, count


@numba.njit(cache=True, nogil=True)
def paragraphs_of(codes: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends), int32 [paragraphs], of the text without white space around it, cut at "\\n{2,}"."""
    first, last = trim(codes, kinds, 0, len(codes))
    count = 1
    for position in range(first, last - 1):
        count += (codes[position] == _NEWLINE) & (codes[position + 1] == _NEWLINE)
    starts, ends = np.empty(count, np.int32), np.empty(count, np.int32)
    number, start, position = 0, first, first
    while position < last:
        if codes[position] != _NEWLINE:
            position += 1
            continue
        run = position
        while codes[position] == _NEWLINE:  # the text does not end in one
            position += 1
        if position - run >= 2:
            starts[number], ends[number] = start, run
            number += 1
            start = position
    starts[number], ends[number] = start, last
    return starts[: number + 1], ends[: number + 1]


@numba.njit(cache=True, nogil=True)
def repeated(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[int, int]:
    """(spans equal to an earlier one, their characters)."""
    hashes, lengths = np.empty(len(starts), np.uint64), np.empty(len(starts), np.int64)
    for span in range(len(starts)):
        hashes[span], lengths[span] = span_hash(codes, starts[span], ends[span]), ends[span] - starts[span]
    return repeated_spans(hashes, lengths)


@numba.njit(cache=True, nogil=True)
def characters(codes: np.ndarray, kinds: np.ndarray) -> tuple[int, int, int, int]:
    """(number signs, ellipses, letters and digits, newlines); "..." counts without overlap."""
    signs = ellipses = alnum = newlines = dots = 0
    for position in range(len(codes)):
        code = codes[position]
        signs += code == _HASH
        newlines += code == _NEWLINE
        ellipses += code == _ELLIPSIS
        alnum += (kinds[position] & ALNUM) != 0
    for code in codes:
        dots = dots + 1 if code == _DOT else 0
        if dots == 3:
            ellipses += 1
            dots = 0
    return signs, ellipses, alnum, newlines
