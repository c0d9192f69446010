"""Words of a text as arrays of positions and hashes, from which scores, shingles and n-grams are computed.

There are four splitters; every rule about words depends on which one is used:
  spaces  pieces between white space, with their punctuation
  words   runs of letters, digits and combining marks (with an apostrophe inside), each CJK character by itself, and
          each run of one other sign by itself, much as linguistic tokenizers split
  cjk     the same words, but an n-gram spans 2n of them, since a Chinese word has two characters on average
  spacy   English words as spaCy finds them (see `english`), with its rules for abbreviations, addresses, contractions;
          n-grams of five words and more are then compared without the spaces between them, as datatrove does
The first three use no dictionary and make no exception for abbreviations.
"""

from enum import IntEnum

import numba
import numpy as np

from data_pipeline.scan.characters import ALPHA, CJK, SPACE, SYMBOL, WORD

# Bits of a word's traits, as `describe` returns them.
SOUND = np.uint8(1)  # not all of its characters are punctuation
LETTERED = np.uint8(2)  # contains a letter

_LETTERS = WORD | CJK  # a character with WORD but not CJK is part of a word of several characters
_APOSTROPHE, _CURLY_APOSTROPHE = 0x27, 0x2019
FNV_OFFSET, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
# Base of the polynomial hashes of n-grams; odd, so that multiplication by it is one to one modulo 2^64.
BASE = np.uint64(0x2545F4914F6CDD1D)


class Splitter(IntEnum):
    """Way to split a text into words; the module's docstring describes each."""

    spaces = 0
    words = 1
    cjk = 2
    spacy = 3

    def window(self, n: int) -> int:
        """Returns how many words of this splitter make an n-gram."""
        return 2 * n if self is Splitter.cjk else n


@numba.njit(cache=True, nogil=True)
def mix(value: np.uint64) -> np.uint64:
    """Scrambles 64 bits by the finaliser of splitmix64 (Steele et al. 2014), which is one to one."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True, inline="always")
def is_apostrophe(code: np.uint32) -> bool:
    """Whether a code point is a straight or curly apostrophe."""
    return code in (_APOSTROPHE, _CURLY_APOSTROPHE)


@numba.njit(cache=True, nogil=True)
def span_hash(codes: np.ndarray, start: int, end: int) -> np.uint64:
    """Hashes a span of code points by FNV-1a (Fowler, Noll, Vo) and `mix`; the result is the same on every machine."""
    value = FNV_OFFSET
    for position in range(start, end):
        value = (value ^ np.uint64(codes[position])) * FNV_PRIME
    return mix(value)


def word_hash(word: str) -> int:
    """Returns the `span_hash` of a whole string, computed in plain Python."""
    value = int(FNV_OFFSET)
    for character in word:
        value = (value ^ ord(character)) * int(FNV_PRIME) % (1 << 64)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        value = (value ^ value >> shift) * int(factor) % (1 << 64)
    return value ^ value >> 31


@numba.njit(cache=True, nogil=True)
def split(codes: np.ndarray, kinds: np.ndarray, splitter: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the (starts, ends) of words in characters, each int32 [words]; for all splitters but spacy."""
    size = len(codes)
    starts, ends = np.empty(size, np.int32), np.empty(size, np.int32)
    count = position = 0
    while position < size:
        kind = kinds[position]
        if kind & SPACE:
            position += 1
            continue
        start = position
        position += 1
        if splitter == 0:
            while position < size and not kinds[position] & SPACE:
                position += 1
        elif kind & _LETTERS == WORD:
            # Written out here, since a function call is four times as slow.
            while position < size:
                if kinds[position] & _LETTERS == WORD:
                    position += 1
                elif is_apostrophe(codes[position]) and position + 1 < size and kinds[position + 1] & _LETTERS == WORD:
                    position += 2
                else:
                    break
        elif not kind & CJK:
            while position < size and codes[position] == codes[start]:
                position += 1
        starts[count], ends[count] = start, position
        count += 1
    return starts[:count], ends[:count]


@numba.njit(cache=True, nogil=True)
def describe(
    codes: np.ndarray, kinds: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (hashes, uint64 [words]; traits, uint8 [words]) of the words at the given positions."""
    hashes, traits = np.empty(len(starts), np.uint64), np.empty(len(starts), np.uint8)
    for word in range(len(starts)):
        value, found, common = FNV_OFFSET, np.uint16(0), np.uint16(0xFFFF)
        for position in range(starts[word], ends[word]):
            code = codes[position]
            value = (value ^ np.uint64(code)) * FNV_PRIME
            kind = kinds[position]
            found |= kind
            common &= kind
        hashes[word] = mix(value)
        traits[word] = (np.uint8(0) if common & SYMBOL else SOUND) | (LETTERED if found & ALPHA else np.uint8(0))
    return hashes, traits
