"""Words of a text as arrays of positions and hashes: what scores, shingles and n-grams are all made of.

Three splitters, each part of the definition of every rule that is bound to words:
  spaces  what stands between white space, punctuation attached
  words   runs of letters, digits and marks (an apostrophe inside included), each CJK character alone, each run
          of one sign alone, as a linguist's tokenizer does in the main
  cjk     the same, and an n-gram spans 2n of them, since a Chinese word has two characters in the mean
  spacy   English words as spaCy finds them, in `english`: abbreviations, addresses and contractions by its rules
The others know no dictionary and no exception for abbreviations.
"""

from enum import IntEnum

import numba
import numpy as np

from data_pipeline.scan.characters import ALPHA, CJK, SPACE, SYMBOL, WORD

# Of a word, in `traits`.
SOUND = np.uint8(1)  # not all of it is punctuation
LETTERED = np.uint8(2)  # has a letter

_LETTERS = WORD | CJK  # WORD alone of the two: a character that goes on with a word
_APOSTROPHE, _CURLY_APOSTROPHE = 0x27, 0x2019
FNV_OFFSET, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
BASE = np.uint64(0x2545F4914F6CDD1D)  # of n-gram polynomials; odd, so that multiplying by it loses nothing modulo 2^64


class Splitter(IntEnum):
    spaces = 0
    words = 1
    cjk = 2
    spacy = 3

    def window(self, n: int) -> int:
        """How many words of this splitter an n-gram spans."""
        return 2 * n if self is Splitter.cjk else n


@numba.njit(cache=True, nogil=True)
def mix(value: np.uint64) -> np.uint64:
    """splitmix64's finaliser (Steele et al. 2014), one to one."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True, inline="always")
def is_apostrophe(code: np.uint32) -> bool:
    return code in (_APOSTROPHE, _CURLY_APOSTROPHE)


@numba.njit(cache=True, nogil=True)
def span_hash(codes: np.ndarray, start: int, end: int) -> np.uint64:
    """FNV-1a over code points (Fowler, Noll, Vo), then mixed: the same on every machine."""
    value = FNV_OFFSET
    for position in range(start, end):
        value = (value ^ np.uint64(codes[position])) * FNV_PRIME
    return mix(value)


def word_hash(word: str) -> int:
    """`span_hash` of a whole string, in plain Python."""
    value = int(FNV_OFFSET)
    for character in word:
        value = (value ^ ord(character)) * int(FNV_PRIME) % (1 << 64)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        value = (value ^ value >> shift) * int(factor) % (1 << 64)
    return value ^ value >> 31


@numba.njit(cache=True, nogil=True)
def split(codes: np.ndarray, kinds: np.ndarray, splitter: int) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends), int32 [words], in characters, for all splitters but spacy."""
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
            # Written out, not called: it is four times as fast.
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
    """(hashes uint64 [words], traits uint8 [words]) of the words at the given positions."""
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
