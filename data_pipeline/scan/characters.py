"""Table of character classes: a set of bits per code point, which the compiled scan looks up.

The classes are those of Python's own predicates (`str.isspace`, `isalpha`, `isalnum`, `splitlines`), so that counts
agree with code that uses these; the punctuation sets are datatrove's. The table ends at U+1FFFF. Above it are the rarer
ideographs, which all count as letters here, and tags and private-use characters, which belong to no class.
"""

import functools
import unicodedata

import numba
import numpy as np
from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION

SPACE = np.uint16(1 << 0)  # str.isspace
ALPHA = np.uint16(1 << 1)  # str.isalpha
ALNUM = np.uint16(1 << 2)  # str.isalnum
WORD = np.uint16(1 << 3)  # \w of `re`, and combining marks, which belong to the letter before them
CJK = np.uint16(1 << 4)  # Chinese, Japanese and Korean characters
SYMBOL = np.uint16(1 << 5)  # datatrove's PUNCTUATION_SET
TERMINAL = np.uint16(1 << 6)  # datatrove's TERMINAL_PUNCTUATION
UPPER = np.uint16(1 << 7)  # str.isupper
DIGIT = np.uint16(1 << 8)  # str.isdigit
BREAK = np.uint16(1 << 9)  # ends a line for str.splitlines

_IDEOGRAPH = ALPHA | ALNUM | WORD | CJK

SIZE = 0x20000
_LAST_IDEOGRAPH = 0x323AF
_CJK_RANGES = (
    (0x3040, 0x30FF),  # kana
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7AF),  # Hangul syllables
    (0xF900, 0xFAFF),
)
_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


@functools.cache
def classes() -> np.ndarray:
    """Returns the classes of each code point as bits, uint16 [SIZE]; a process builds this table once."""
    characters = [chr(code) for code in range(SIZE)]
    table = np.zeros(SIZE, np.uint16)
    for bit, predicate in (
        (SPACE, str.isspace),
        (ALPHA, str.isalpha),
        (ALNUM | WORD, str.isalnum),
        (UPPER, str.isupper),
        (DIGIT, str.isdigit),
    ):
        table[np.fromiter(map(predicate, characters), bool, SIZE)] |= bit
    marks = np.fromiter((unicodedata.combining(character) > 0 for character in characters), bool, SIZE)
    table[marks] |= WORD
    table[ord("_")] |= WORD
    for first, last in _CJK_RANGES:
        table[first : last + 1] |= CJK
    for bit, members in ((SYMBOL, PUNCTUATION_SET), (TERMINAL, TERMINAL_PUNCTUATION), (BREAK, _BREAKS)):
        table[[ord(character) for character in members]] |= bit
    return table


@functools.cache
def lower_case() -> np.ndarray:
    """Returns the table of lower-case code points, uint32 [SIZE].

    A code point without lower case, or whose lower case is several characters, maps to itself.
    """
    lowered = [chr(code).lower() for code in range(SIZE)]
    return np.fromiter((ord(c) if len(c) == 1 else code for code, c in enumerate(lowered)), np.uint32, SIZE)


def codes_of(text: str) -> np.ndarray:
    """Returns the code points of a text, uint32 [characters]; lone surrogates are allowed."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def kinds_of(codes: np.ndarray) -> np.ndarray:
    """Returns the class bits of each code point, uint16 [characters]."""
    return _look_up(codes, classes())


@numba.njit(cache=True, nogil=True, inline="always")
def is_ideograph(code: np.uint32) -> bool:
    """Whether a code point above the table (SIZE or higher) counts as an ideograph."""
    return bool(code <= _LAST_IDEOGRAPH)


@numba.njit(cache=True, nogil=True)
def _look_up(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    kinds = np.empty(len(codes), np.uint16)
    for index in range(len(codes)):
        code = codes[index]
        if code < SIZE:
            kinds[index] = table[code]
        else:
            kinds[index] = _IDEOGRAPH if is_ideograph(code) else 0
    return kinds
