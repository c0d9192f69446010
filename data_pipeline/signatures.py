"""Exact and MinHash fingerprints of documents, the per-document half of deduplication.

Exact: a 128-bit hash of the text without case and with white space made one. MinHash (Broder 1997) with LSH
bands as in FineWeb: `bands` x `rows` minima of affine hashes modulo 2^64 over word n-grams; of each band only
a 64-bit key is kept. Two documents of Jaccard similarity s share a key with probability 1 - (1 -
s^rows)^bands: 0.77 at 0.75 and 0.99 at 0.85 for 14 x 8. Grouping by key is left to `dedup`.
"""

import hashlib
import unicodedata
from typing import Any

import numpy as np
from datatrove.data import Document

from configs.data import DataConfig, DedupConfig
from data_pipeline.tables import TableStep
from data_pipeline.words import Coded, Splitter, mix, ngram_hashes, split_plain, stable_hash, window

_BLOCK = 2048  # n-grams hashed at a time: with 112 hashes, under 2 MB, which stays in cache
_CACHE_WORDS = 500_000


def exact_hash(text: str) -> str:
    """32 hex digits, equal for texts that differ in case, white space and Unicode composition only."""
    normal = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class MinHasher:
    """text -> uint64 [bands], the keys under which near-duplicates meet.

    A function of text and settings alone.
    """

    def __init__(self, settings: DedupConfig) -> None:
        self.settings = settings
        count = settings.bands * settings.rows
        seeds = mix(np.arange(2 * count, dtype=np.uint64) + np.uint64(stable_hash(f"minhash {settings.seed}")))
        self._scale = seeds[:count] | np.uint64(1)  # odd: a permutation of the 64-bit numbers
        self._shift = seeds[count:]
        self._words: dict[str, int] = {}

    def signature(self, text: str, splitter: Splitter) -> np.ndarray:
        """uint64 [bands * rows], the minimum of each hash over the text's n-grams."""
        if len(self._words) > _CACHE_WORDS:
            self._words.clear()
        size = window(self.settings.ngram, splitter)
        words = Coded.of(split_plain(text, splitter))
        hashes = words.stable_hashes(self._words)
        shingles = ngram_hashes(hashes, [size])[size]
        if not len(shingles):  # shorter than one n-gram: the whole text is its only one
            shingles = np.array([stable_hash(" ".join(words.unique[place] for place in words.ids))], np.uint64)
        lowest = np.full(len(self._scale), np.iinfo(np.uint64).max, np.uint64)
        for start in range(0, len(shingles), _BLOCK):
            block = self._scale[:, None] * shingles[start : start + _BLOCK] + self._shift[:, None]
            np.minimum(lowest, block.min(axis=1), out=lowest)
        return lowest

    def keys(self, text: str, splitter: Splitter) -> np.ndarray:
        """uint64 [bands]."""
        rows = self.signature(text, splitter).reshape(self.settings.bands, self.settings.rows)
        key = mix(np.arange(self.settings.bands, dtype=np.uint64) + np.uint64(1))
        for column in rows.T:
            key = mix(key ^ column)
        return key


class Sign(TableStep):
    """A row of fingerprints for each document that the language stage kept."""

    name = "Signatures"

    def __init__(self, folder: str, tallies: str, config: DataConfig, language: str) -> None:
        super().__init__(folder, tallies, select=language)
        self.rules = config.rules
        self.hasher = MinHasher(config.dedup)

    def measure(self, document: Document, before: dict[str, Any]) -> dict[str, Any]:
        splitter = self.rules[before["rules"]].splitter
        return {"exact": exact_hash(document.text), "keys": self.hasher.keys(document.text, splitter)}
