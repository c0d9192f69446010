"""Words, lines and n-grams of a text as arrays: what the quality scores and the MinHash signatures both read.

Two splitters. `spaces`: a word is what stands between white space, punctuation attached. `cjk`: every
Chinese, Japanese or Korean character is a word of its own, other runs of letters and digits are words, and
each remaining sign is one. There is no dictionary; instead a "word" of an n-gram rule counts as two
characters, about the mean of Chinese words, so that an n-gram is a window of 2n characters. Verdicts depend
on the splitter: it is part of a rule set.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Splitter = Literal["spaces", "cjk"]

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
_CJK_WORDS = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")
_PLAIN_WORDS = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_LATIN_WORDS = re.compile(r"\w+")

_MIX_1, _MIX_2, _STEP = (
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
    np.uint64(0x9E3779B97F4A7C15),
)
_BASE = np.uint64(0x2545F4914F6CDD1D)  # odd, so that multiplying by it loses nothing modulo 2^64


def split(text: str, splitter: Splitter) -> list[str]:
    return text.split() if splitter == "spaces" else _CJK_WORDS.findall(text)


def split_plain(text: str, splitter: Splitter) -> list[str]:
    """Lower-cased words without punctuation, for finding near-duplicates."""
    return (_LATIN_WORDS if splitter == "spaces" else _PLAIN_WORDS).findall(text.lower())


def window(n: int, splitter: Splitter) -> int:
    """How many units of `split` an n-gram spans."""
    return n if splitter == "spaces" else 2 * n


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014), uint64 to uint64, one to one."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def stable_hash(word: str) -> int:
    """64-bit hash of a string, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Coded:
    """A word sequence as numbers: `ids` index `unique`, both in order of first occurrence."""

    ids: np.ndarray  # int64 [words]
    unique: list[str]

    @classmethod
    def of(cls, words: Sequence[str]) -> "Coded":
        table: dict[str, int] = {}
        ids = np.fromiter((table.setdefault(word, len(table)) for word in words), np.int64, len(words))
        return cls(ids, list(table))

    def lengths(self) -> np.ndarray:
        """int64 [words], characters."""
        return np.fromiter(map(len, self.unique), np.int64, len(self.unique))[self.ids]

    def local_hashes(self) -> np.ndarray:
        """uint64 [words], equal for equal words of this text only: cheap, for counting within a document."""
        return mix((self.ids.astype(np.uint64) + np.uint64(1)) * _STEP)

    def stable_hashes(self, cache: dict[str, int]) -> np.ndarray:
        """uint64 [words] by `stable_hash`; `cache` keeps words from one document to the next."""
        for word in self.unique:
            if word not in cache:
                cache[word] = stable_hash(word)
        return np.fromiter((cache[word] for word in self.unique), np.uint64, len(self.unique))[self.ids]


def ngram_hashes(hashes: np.ndarray, sizes: Sequence[int]) -> dict[int, np.ndarray]:
    """size -> uint64 [words - size + 1], a hash of each window of `size` words. Sizes ascend.

    A polynomial in the words' hashes modulo 2^64: order counts and words are never joined, so "a bc" is not
    "ab c".
    """
    found: dict[int, np.ndarray] = {}
    current, size = hashes, 1
    for wanted in sizes:
        while size < wanted and len(current) > 1:
            current = current[:-1] * _BASE + hashes[size:]
            size += 1
        found[wanted] = mix(current) if size == wanted else hashes[:0]
    return found
