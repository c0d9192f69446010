"""Counts over a text's lines, paragraphs and characters: how lines begin and end, their length, which are repeated.

"Line" has three meanings, as in the sources of the rules: Gopher's bullets and ellipses split by `str.splitlines`,
FineWeb's rules at "\\n" and without blank lines, Gopher's repetition at "\\n+" (and paragraphs at "\\n{2,}"). White
space is `str.isspace`.
"""

import numba
import numpy as np

from data_pipeline.scan.characters import ALNUM, BREAK, SPACE, TERMINAL
from data_pipeline.scan.repetition import repeated_spans
from data_pipeline.scan.words import span_hash

SHORT_LINE = 30  # characters of a line that counts as short, as in FineWeb
_NEWLINE, _RETURN, _HASH, _DOT, _ELLIPSIS, _DASH, _BULLET = 0x0A, 0x0D, 0x23, 0x2E, 0x2026, 0x2D, 0x2022


@numba.njit(cache=True, nogil=True)
def lines_of(codes: np.ndarray, kinds: np.ndarray, any_break: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (starts, ends) of lines, each int32 [lines]: those of `str.splitlines()` or, without `any_break`, of
    `str.split("\\n")`.
    """
    count = 1
    for kind in kinds:
        count += (kind & BREAK) != 0
    starts, ends = np.empty(count, np.int32), np.empty(count, np.int32)
    number = start = 0
    for position in range(len(codes)):
        if not kinds[position] & BREAK or (codes[position] != _NEWLINE and not any_break):
            continue
        if any_break and codes[position] == _NEWLINE and position > 0 and codes[position - 1] == _RETURN:
            start = position + 1  # the \r of \r\n has ended the line already
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
    """Returns the (start, end) of a span without the white space around it."""
    while start < end and kinds[start] & SPACE:
        start += 1
    while start < end and kinds[end - 1] & SPACE:
        end -= 1
    return start, end


@numba.njit(cache=True, nogil=True)
def ends_in_ellipsis(codes: np.ndarray, start: int, end: int) -> bool:
    """Whether a span ends in … or three full stops."""
    if end > start and codes[end - 1] == _ELLIPSIS:
        return True
    return end - start >= 3 and codes[end - 1] == _DOT and codes[end - 2] == _DOT and codes[end - 3] == _DOT


@numba.njit(cache=True, nogil=True)
def gopher_lines(codes: np.ndarray, kinds: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[int, int]:
    """Returns (number of lines that begin with a bullet, number of lines that end in an ellipsis)."""
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
    """Returns six counts over the lines that are not blank.

    They are (lines, lines that end in terminal punctuation, short lines, characters of lines equal to an earlier one,
    characters of all lines, characters of the longest line).
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
    """Returns (lines equal to an earlier one, characters of these, all lines) for a text split at "\\n+".

    `starts` and `ends` are those of `split("\\n")`. Empty lines count only at the very beginning and end of the text.
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
    """Returns the (starts, ends) of paragraphs, each int32 [paragraphs]: the stripped text split at "\\n{2,}"."""
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
        while codes[position] == _NEWLINE:  # ends, since the stripped text does not end in a newline
            position += 1
        if position - run >= 2:
            starts[number], ends[number] = start, run
            number += 1
            start = position
    starts[number], ends[number] = start, last
    return starts[: number + 1], ends[: number + 1]


@numba.njit(cache=True, nogil=True)
def repeated(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[int, int]:
    """Returns (number of spans equal to an earlier one, characters of these)."""
    hashes, lengths = np.empty(len(starts), np.uint64), np.empty(len(starts), np.int64)
    for span in range(len(starts)):
        hashes[span], lengths[span] = span_hash(codes, starts[span], ends[span]), ends[span] - starts[span]
    return repeated_spans(hashes, lengths)


@numba.njit(cache=True, nogil=True)
def characters(codes: np.ndarray, kinds: np.ndarray) -> tuple[int, int, int, int]:
    """Returns counts of (number signs, ellipses, letters and digits, newlines); each "..." is one ellipsis too."""
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
