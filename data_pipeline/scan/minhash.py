"""MinHash signatures (Broder 1997) of a text's word n-grams, in compiled code.

Words are lower-cased runs of letters and digits, and single CJK characters, without punctuation. Each hash function is
an affine map modulo 2^64 of an n-gram's hash; a signature holds the minimum of each function over all n-grams.

Some texts are given no n-grams, so that they are a near-duplicate of no other text. These are texts with fewer words
than an n-gram, in which punctuation matters ("x = -1" and "x = 1" have the same words), and texts that consist mainly
of signs, such as emoji, frames or drawings beside a few words, since the words do not characterize them.
"""

import unicodedata

import numba
import numpy as np

from data_pipeline.scan.characters import codes_of
from data_pipeline.scan.folding import ALONE, BLANK, CODE, LETTER, SHIFT, fold, fold_alone, folded
from data_pipeline.scan.scores import in_lower_case
from data_pipeline.scan.words import BASE, FNV_OFFSET, FNV_PRIME, is_apostrophe, mix

_BLOCK = 2048  # n-grams hashed at a time: 16 kB, which fit into the L1 cache
_SIGNS_A_WORD = 4  # most signs per word of a text that gets n-grams; JSON without spaces has about three
_HIGHEST = np.uint64(0xFFFFFFFFFFFFFFFF)


def signature(text: str, window: int, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Returns a text's signature, uint64 [hashes]: the minimum of `scale` * n-gram + `shift` over its n-grams.

    N-grams have `window` words. The signature is empty for a text without n-grams. `scale` and `shift` are uint64
    [hashes]; `scale` has to be odd, which makes each hash function a permutation of the 64-bit numbers.
    """
    ngrams = shingles(text, window)
    return _least(ngrams, scale, shift) if len(ngrams) else np.zeros(0, np.uint64)


def shingles(text: str, window: int) -> np.ndarray:
    """Returns the hashes of a text's n-grams of `window` words, uint64 [n-grams], in the text's order.

    Texts that differ only in case, white space and Unicode composition get the same hashes. The result is empty for
    texts with too few words or mainly signs (see the module's docstring).
    """
    text = unicodedata.normalize("NFC", text)
    hashes, signs = _word_hashes(codes_of(text if fold_alone(text) else in_lower_case(text)), folded())
    if len(hashes) < window or signs > _SIGNS_A_WORD * len(hashes):
        return np.zeros(0, np.uint64)
    return _ngrams(hashes, window)


@numba.njit(cache=True, nogil=True)
def _word_hashes(codes: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, int]:
    """Returns (hash of each word in lower case, uint64 [words]; number of signs, a run of one sign counted once).

    In one pass it gives the words of `Splitter.words` that are not signs, and their `span_hash`.
    """
    hashes = np.empty(len(codes), np.uint64)
    count = position = signs = 0
    while position < len(codes):
        entry = fold(codes[position], table)
        position += 1
        if not entry >> SHIFT & (LETTER | ALONE):
            if not entry >> SHIFT & BLANK and (position < 2 or codes[position - 2] != codes[position - 1]):
                signs += 1
            continue
        value = (FNV_OFFSET ^ np.uint64(entry & CODE)) * FNV_PRIME
        goes_on = entry >> SHIFT == LETTER
        while goes_on and position < len(codes):
            entry = fold(codes[position], table)
            if entry >> SHIFT == LETTER:
                value = (value ^ np.uint64(entry & CODE)) * FNV_PRIME
                position += 1
                continue
            after = fold(codes[position + 1], table) if position + 1 < len(codes) else np.uint32(0)
            goes_on = is_apostrophe(codes[position]) and after >> SHIFT == LETTER
            if goes_on:
                value = (value ^ np.uint64(codes[position])) * FNV_PRIME
                value = (value ^ np.uint64(after & CODE)) * FNV_PRIME
                position += 2
        hashes[count] = mix(value)
        count += 1
    return hashes[:count], signs


@numba.njit(cache=True, nogil=True)
def _ngrams(hashes: np.ndarray, size: int) -> np.ndarray:
    """Returns the hashes of all n-grams of `size` words, uint64 [words - size + 1]."""
    count = len(hashes)
    found = np.empty(count - size + 1, np.uint64)
    # A rolling polynomial hash: the word that leaves the window is subtracted, times BASE ** size.
    power, value = np.uint64(1), np.uint64(0)
    for word in range(size):
        value = value * BASE + hashes[word]
        power *= BASE
    found[0] = mix(value)
    for word in range(size, count):
        value = value * BASE + hashes[word] - hashes[word - size] * power
        found[word - size + 1] = mix(value)
    return found


@numba.njit(cache=True, nogil=True)
def _least(shingles: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Returns the minimum of each hash function over all n-grams, uint64 [hashes]."""
    lowest = np.full(len(scale), _HIGHEST, np.uint64)
    for first in range(0, len(shingles), _BLOCK):
        block = shingles[first : first + _BLOCK]
        for number in range(len(scale)):
            least, factor, term = lowest[number], scale[number], shift[number]
            for position in range(len(block)):  # in this form it is compiled to vector instructions
                value = factor * block[position] + term
                least = value if value < least else least
            lowest[number] = least
    return lowest


@numba.njit(cache=True, nogil=True)
def band_keys(signature: np.ndarray, bands: int) -> np.ndarray:
    """Returns a hash of each band of a signature, uint64 [bands]; equal rows in different bands get different keys."""
    rows = len(signature) // bands
    keys = np.empty(bands, np.uint64)
    for band in range(bands):
        key = mix(np.uint64(band + 1))
        for row in range(rows):
            key = mix(key ^ signature[band * rows + row])
        keys[band] = key
    return keys
