"""Case folding by one table look-up per character, for the fingerprints of texts.

`str.lower` maps every character by itself except two: "İ" becomes two characters, and the lower case of "Σ" depends on
its position in the word. Texts with one of these go through `str.lower` first; for all others the table gives the same
result.
"""

import functools

import numba
import numpy as np

from data_pipeline.scan.characters import CJK, SIZE, SPACE, WORD, classes, codes_of, is_ideograph, lower_case

# An entry of the table is a code point in the low 24 bits and one of the three classes in the bits above.
SHIFT = np.uint32(24)
CODE = np.uint32((1 << 24) - 1)
LETTER = np.uint32(1)  # part of a word of several characters
ALONE = np.uint32(2)  # a word by itself: a CJK character
BLANK = np.uint32(4)  # white space
_NOT_BY_ITSELF = ("\u0130", "\u03a3")


@functools.cache
def folded() -> np.ndarray:
    """Returns the table of case folding, uint32 [SIZE]: a character's lower case, with its class in the bits above."""
    lowered = lower_case()
    kinds = classes()[lowered]
    words = np.where(kinds & WORD == 0, 0, np.where(kinds & CJK == 0, LETTER, ALONE))
    blanks = np.where(kinds & SPACE == 0, 0, BLANK)
    return lowered | (words | blanks).astype(np.uint32) << SHIFT


def fold_alone(text: str) -> bool:
    """Whether the table is enough to fold `text`, since `str.lower` maps each of its characters by itself."""
    return not any(character in text for character in _NOT_BY_ITSELF)


@numba.njit(cache=True, nogil=True, inline="always")
def fold(code: np.uint32, table: np.ndarray) -> np.uint32:
    """Looks up the entry of a code point; for one above the table, which has no case, the entry is computed."""
    if code < SIZE:
        return table[code]
    return code | (ALONE << SHIFT if is_ideograph(code) else np.uint32(0))


def plain_bytes(text: str) -> np.ndarray:
    """Returns the UTF-8 of `" ".join(text.lower().split())` as uint8 [bytes]; lone surrogates are allowed."""
    return _plain(codes_of(text if fold_alone(text) else text.lower()), folded())


@numba.njit(cache=True, nogil=True)
def _plain(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    out = np.empty(4 * len(codes) + 1, np.uint8)
    size, blank = 0, False
    for code in codes:
        entry = fold(code, table)
        if entry >> SHIFT & BLANK:
            blank = size > 0  # no space at the start
            continue
        if blank:  # written before the next character, so that there is no space at the end
            out[size] = 0x20
            size, blank = size + 1, False
        value = entry & CODE
        if value < 0x80:
            out[size] = value
            size += 1
        elif value < 0x800:
            out[size], out[size + 1] = 0xC0 | value >> 6, 0x80 | value & 0x3F
            size += 2
        elif value < 0x10000:
            out[size], out[size + 1], out[size + 2] = 0xE0 | value >> 12, 0x80 | value >> 6 & 0x3F, 0x80 | value & 0x3F
            size += 3
        else:
            out[size], out[size + 1] = 0xF0 | value >> 18, 0x80 | value >> 12 & 0x3F
            out[size + 2], out[size + 3] = 0x80 | value >> 6 & 0x3F, 0x80 | value & 0x3F
            size += 4
    return out[:size]
