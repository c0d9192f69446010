"""Index of the n-grams of evaluation files, which are searched for in documents.

Texts are compared word by word, in lower case and without punctuation (so "don't" is two words); every Chinese,
Japanese or Korean character is a word. If an item is mostly in such characters, its n-grams have 2n words, as in
`scan.words`. Anything between words is ignored. An item too short for one n-gram is searched for as a whole if it has
at least `min_words`; otherwise it is not searched for, and `evaluation.json` of the stage counts it as too short.
Full-width letters, differences in spelling and paraphrases are not recognized.

N-grams are found by sorted 64-bit hashes, and each hit is then compared word by word.
"""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np

from configs.cuts import DecontaminateConfig
from data_pipeline.cutting.cuts import union
from data_pipeline.cutting.evaluation_items import EvaluationItem
from data_pipeline.scan.characters import CJK, WORD, codes_of, kinds_of
from data_pipeline.scan.scores import in_lower_case
from data_pipeline.scan.words import BASE, Splitter, mix, span_hash

_LETTERS = WORD | CJK
_BITS_PER_PROBE = 16  # bitmap size per n-gram: of the hashes that are not in the index, at most 1 in 16 passes


class NgramMatch(NamedTuple):
    """An evaluation item found in a document; `spans` are disjoint parts of the document, in characters, in order."""

    item: int
    ngrams: int  # how many distinct n-grams of the item were found
    share: float  # the same as a share of all its distinct n-grams
    spans: list[tuple[int, int]]


class TextWords(NamedTuple):
    """The words of a text: their positions in characters, their hashes, and how many are CJK characters."""

    starts: np.ndarray  # int64 [words]
    ends: np.ndarray
    hashes: np.ndarray  # uint64 [words]
    cjk: int


def words_of(text: str) -> TextWords:
    """Splits a text into words, in the way that this module's docstring describes."""
    codes = codes_of(in_lower_case(text))
    return TextWords(*_words(codes, kinds_of(codes)))


@numba.njit(cache=True, nogil=True)
def _words(codes: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    size = len(codes)
    starts, ends, hashes = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.uint64)
    count = position = cjk = 0
    while position < size:
        kind = kinds[position]
        start = position
        position += 1
        if not kind & _LETTERS:
            continue
        if kind & CJK:
            cjk += 1
        else:
            while position < size and kinds[position] & _LETTERS == WORD:
                position += 1
        starts[count], ends[count], hashes[count] = start, position, span_hash(codes, start, position)
        count += 1
    return starts[:count].copy(), ends[:count].copy(), hashes[:count].copy(), cjk


@numba.njit(cache=True, nogil=True)
def ngrams_of(hashes: np.ndarray, size: int) -> np.ndarray:
    """Hashes every `size` words in a row; returns uint64 [words - size + 1], which depend on the words' order."""
    found = np.empty(max(len(hashes) - size + 1, 0), np.uint64)
    power, value = np.uint64(1), np.uint64(0)
    for _ in range(size):
        power *= BASE
    for word in range(len(hashes)):
        value = value * BASE + hashes[word]
        if word >= size:
            value -= hashes[word - size] * power
        if word + 1 >= size:
            found[word + 1 - size] = mix(value)
    return found


@dataclass
class _NgramTable:
    """Table of the n-grams of one size, sorted by hash, with a row for each occurrence in an item."""

    hashes: np.ndarray  # uint64 [n]
    items: np.ndarray  # int64 [n]
    positions: np.ndarray  # int64 [n], in words of the item

    def __post_init__(self) -> None:
        bits = max(16, int(_BITS_PER_PROBE * len(self.hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._seen = np.zeros(1 << bits, bool)
        self._seen[self.hashes >> self._shift] = True

    def hits(self, hashes: np.ndarray) -> np.ndarray:
        """Returns the indices of those `hashes` that are in the table."""
        chosen = np.flatnonzero(self._seen[hashes >> self._shift])
        positions = np.minimum(np.searchsorted(self.hashes, hashes[chosen]), len(self.hashes) - 1)
        return chosen[self.hashes[positions] == hashes[chosen]]


class NgramIndex:
    """All n-grams of a run's evaluation files; saved once and loaded by every task."""

    def __init__(self, arrays: dict[str, np.ndarray], names: list[list[str]]) -> None:
        self.arrays = arrays
        self.names = names  # [file, id] of each item
        self.sizes = sorted(set(arrays["size"].tolist()) - {0})
        self._tables = {
            size: _NgramTable(
                *(arrays[name][arrays["gram_size"] == size] for name in ("hash", "gram_item", "gram_position"))
            )
            for size in self.sizes
        }

    @classmethod
    def of(cls, items: Iterator[EvaluationItem], settings: DecontaminateConfig) -> "NgramIndex":
        """Builds the index of all items."""
        names, words, sizes, distinct, lengths = [], [np.zeros(0, np.uint64)], [], [], []
        grams: list[tuple[np.ndarray, int, int]] = []
        for number, item in enumerate(items):
            found = words_of(unicodedata.normalize("NFC", item.text))
            hashes, count = found.hashes, len(found.hashes)
            splitter = Splitter.cjk if 2 * found.cjk > count else Splitter.words
            size = splitter.window(settings.ngram)
            if count < size:
                size = count if count >= splitter.window(settings.min_words) else 0
            hashed = ngrams_of(hashes, size) if size else hashes[:0]
            names.append([item.file, item.id])
            words.append(hashes)
            sizes.append(size)
            lengths.append(count // splitter.window(1))
            distinct.append(len(np.unique(hashed)))
            grams.append((hashed, number, size))
        counts = [len(hashed) for hashed, _, _ in grams]
        table = np.concatenate([np.zeros(0, np.uint64), *(hashed for hashed, _, _ in grams)])
        order = np.argsort(table, kind="stable")
        positions = np.concatenate([np.zeros(0, np.int64), *map(np.arange, counts)])
        return cls(
            {
                "words": np.concatenate(words),
                "starts": np.cumsum([0, *map(len, words[1:])]),
                "size": np.array(sizes, np.int64),
                "distinct": np.array(distinct, np.int64),
                "length": np.array(lengths, np.int64),  # in words, or pairs of characters in CJK text
                "hash": table[order],
                "gram_item": np.repeat(np.arange(len(grams)), counts)[order],
                "gram_size": np.repeat(np.array(sizes, np.int64), counts)[order],
                "gram_position": positions[order].astype(np.int64),
            },
            names,
        )

    def save(self, folder: Path) -> None:
        """Writes the index to a new folder."""
        folder.mkdir(parents=True)
        np.savez(folder / "ngram_index.npz", allow_pickle=False, **self.arrays)
        (folder / "names.json").write_text(json.dumps(self.names), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "NgramIndex":
        """Reads an index that `save` wrote."""
        with np.load(Path(folder) / "ngram_index.npz", allow_pickle=False) as arrays:
            return cls(dict(arrays), json.loads((Path(folder) / "names.json").read_text(encoding="utf-8")))

    def summary(self) -> dict[str, dict[str, int]]:
        """Counts, for each file: items, items too short to be searched for, the sum of all items' distinct n-grams.

        `longest` is the length of the file's longest item, in words as `min_words` counts them.
        """
        found: dict[str, dict[str, int]] = {}
        for (file, _), size, distinct, length in zip(
            self.names, *(self.arrays[name].tolist() for name in ("size", "distinct", "length")), strict=True
        ):
            counts = found.setdefault(file, {"items": 0, "too_short": 0, "ngrams": 0, "longest": 0})
            counts["longest"] = max(counts["longest"], length)
            counts["items"] += 1
            counts["too_short"] += size == 0
            counts["ngrams"] += distinct
        return found

    def matches(self, text: str, min_share: float) -> list[NgramMatch]:
        """Finds items of which `text` holds at least one n-gram and the share `min_share` of its n-grams.

        Items with the most n-grams come first; items with equally many are in file order.
        """
        words = words_of(text)
        found = []
        for item, occurrences in self._hits(words.hashes).items():
            share = len({gram for _, gram in occurrences}) / int(self.arrays["distinct"][item])
            if share >= min_share:
                size = int(self.arrays["size"][item])
                spans = union([(position, position + size) for position, _ in occurrences])
                found.append(
                    NgramMatch(
                        item,
                        len({gram for _, gram in occurrences}),
                        share,
                        [(int(words.starts[start]), int(words.ends[end - 1])) for start, end in spans],
                    )
                )
        return sorted(found, key=lambda match: (-match.ngrams, match.item))

    def _hits(self, hashes: np.ndarray) -> dict[int, list[tuple[int, int]]]:
        """Finds items' n-grams among a text's words: item -> (index of the first word, n-gram hash) of each hit."""
        found: dict[int, list[tuple[int, int]]] = {}
        starts, words = self.arrays["starts"], self.arrays["words"]
        for size, table in self._tables.items():
            grams = ngrams_of(hashes, size)
            for position in table.hits(grams).tolist():
                gram = grams[position]
                first, last = np.searchsorted(table.hashes, gram), np.searchsorted(table.hashes, gram, "right")
                for row in range(int(first), int(last)):
                    item = int(table.items[row])
                    start = int(starts[item] + table.positions[row])
                    if np.array_equal(hashes[position : position + size], words[start : start + size]):
                        found.setdefault(item, []).append((position, int(gram)))
        return found


def require_ngrams(summary: dict[str, Any]) -> None:
    """Raises ValueError if all items of a file are too short to be searched for."""
    for file, counts in summary.items():
        if counts["items"] == counts["too_short"]:
            longest = counts["longest"]
            remedy = f"lower decontaminate.min_words to {longest}" if longest >= 2 else "leave the file out"
            raise ValueError(
                f"evaluation file {file}: none of its {counts['items']} items has enough words to be searched "
                f"for, the longest has {counts['longest']}; check decontaminate.text_keys, or {remedy}"
            )
