"""Texts without case, as code points from one table look-up a character: what fingerprints are made of.

`str.lower` maps every character by itself but for two: "İ" becomes two characters, and what "Σ" becomes depends on
where it stands. A text that has one of them goes through `str` first; of all others the table says the same.
"""

import functools

import numba
import numpy as np

from data_pipeline.scan.characters import CJK, SIZE, SPACE, WORD, classes, codes_of, is_ideograph, lower_case

# In the bits above a code point.
SHIFT = np.uint32(24)
CODE = np.uint32((1 << 24) - 1)
LETTER = np.uint32(1)  # goes on with a word
ALONE = np.uint32(2)  # is a word by itself: a CJK character
BLANK = np.uint32(4)
_NOT_BY_ITSELF = ("\u0130", "\u03a3")


@functools.cache
def folded() -> np.ndarray:
    """uint32 [SIZE], each character in lower case, and what it is in the bits above."""
    lowered = lower_case()
    kinds = classes()[lowered]
    words = np.where(kinds & WORD == 0, 0, np.where(kinds & CJK == 0, LETTER, ALONE))
    blanks = np.where(kinds & SPACE == 0, 0, BLANK)
    return lowered | (words | blanks).astype(np.uint32) << SHIFT


def fold_alone(text: str) -> bool:
    """True if the table is all that lower case takes."""
    return not any(character in text for character in _NOT_BY_ITSELF)


@numba.njit(cache=True, nogil=True, inline="always")
def fold(code: np.uint32, table: np.ndarray) -> np.uint32:
    """The entry of any code point; those behind the table have no case."""
    if code < SIZE:
        return table[code]
    return code | (ALONE << SHIFT if is_ideograph(code) else np.uint32(0))


def plain_bytes(text: str) -> np.ndarray:
    """uint8, UTF-8 of `" ".join(text.lower().split())`; lone surrogates pass."""
    return _plain(codes_of(text if fold_alone(text) else text.lower()), folded())


@numba.njit(cache=True, nogil=True)
def _plain(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    out = np.empty(4 * len(codes) + 1, np.uint8)
    size, blank = 0, False
    for code in codes:
        entry = fold(code, table)
        if entry >> SHIFT & BLANK:
            blank = size > 0  # none at the start
            continue
        if blank:  # none at the end
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
