"""Tests the one-pass text forms behind fingerprints against slow versions of their definitions."""

import random
import unicodedata

import numpy as np
import pytest

from data_pipeline.scan.characters import SIZE, SPACE, WORD, codes_of, kinds_of
from data_pipeline.scan.folding import CODE, fold_alone, folded, plain_bytes
from data_pipeline.scan.minhash import shingles
from data_pipeline.scan.scores import in_lower_case
from data_pipeline.scan.words import BASE, mix, span_hash, split

# Letters with and without case, capitals whose lower case depends on their neighbours, combining marks, punctuation,
# white space, CJK characters and punctuation, characters of planes 1 to 3, lone surrogates.
_SIGNS = "aAzZ09_ÉßǅİΣσς'’' \t\n\r\x1c\u00a0\u2028\u3000.,!!--\u0301漢字カ・。゙한𝒳𠀀𰀀𱍊\U000e0001\ud800\udfff"


def _texts() -> list[str]:
    draw = random.Random(4)
    alphabets = (_SIGNS, "aB c'D’e. ", "漢字カ・゙ aΣ ", "".join(set(_SIGNS) - {"İ", "Σ"}))
    texts = ["".join(draw.choices(alphabets[n % 4], k=draw.randrange(1, 80))) for n in range(2_000)]
    everything = [chr(code) for code in range(0x3_4000)]
    draw.shuffle(everything)
    return [*texts, "".join(everything), " ", "a", "Σ", "ΑΣ ΑΣΑ", "don't stop", "'tis 'twas'", "o''clock"]


def _shingles(text: str, window: int) -> np.ndarray:
    """Hashes every n-gram by itself, from `split` and `span_hash`; none for texts of few words or mainly signs."""
    text = unicodedata.normalize("NFC", text)
    codes = codes_of(in_lower_case(text))
    kinds = kinds_of(codes)
    starts, ends = split(codes, kinds, 1)
    words = [span_hash(codes, s, e) for s, e in zip(starts, ends, strict=True) if kinds[s] & WORD]
    inside = set().union(*(range(s, e) for s, e in zip(starts, ends, strict=True) if kinds[s] & WORD))
    runs = [n for n in range(len(codes)) if n == 0 or codes[n] != codes[n - 1]]
    signs = sum(n not in inside and not kinds[n] & SPACE for n in runs)
    if len(words) < window or signs > 4 * len(words):
        return np.zeros(0, np.uint64)
    found = []
    for first in range(len(words) - window + 1):
        value = 0
        for word in words[first : first + window]:
            value = (value * int(BASE) + int(word)) % (1 << 64)
        found.append(mix(np.uint64(value)))
    return np.array(found, np.uint64)


@pytest.mark.parametrize("window", [1, 5])
def test_shingles_in_one_pass_are_those_of_the_words(window: int) -> None:
    for text in _texts():
        assert np.array_equal(shingles(text, window), _shingles(text, window)), ascii(text[:100])


def test_plain_bytes_are_the_text_in_lower_case_with_single_spaces() -> None:
    for text in _texts():
        wanted = " ".join(text.lower().split()).encode("utf-8", "surrogatepass")
        assert plain_bytes(text).tobytes() == wanted, ascii(text[:100])


def test_the_table_lowers_as_str_does() -> None:
    table = folded()
    for code in range(0x110000):
        lowered = chr(code).lower()
        if fold_alone(chr(code)):
            assert lowered == chr(table[code] & CODE if code < SIZE else code), hex(code)
