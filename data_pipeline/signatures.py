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
from data_pipeline.hashing import stable_hash
from data_pipeline.scan.minhash import band_keys, signature
from data_pipeline.scan.words import Splitter, mix
from data_pipeline.tables import TableStep


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
        seed = np.uint64(stable_hash(f"minhash {settings.seed}"))
        draws = np.array([mix(np.uint64(number) + seed) for number in range(2 * count)], np.uint64)
        self._scale = draws[:count] | np.uint64(1)
        self._shift = draws[count:]

    def signature(self, text: str, splitter: Splitter) -> np.ndarray:
        """uint64 [bands * rows], the minimum of each hash over the text's n-grams."""
        return signature(text, splitter.window(self.settings.ngram), self._scale, self._shift)

    def keys(self, text: str, splitter: Splitter) -> np.ndarray:
        """uint64 [bands]."""
        return band_keys(self.signature(text, splitter), self.settings.bands)


class Sign(TableStep):
    """A row of fingerprints for each document that the language stage kept."""

    name = "Signatures"

    def __init__(self, folder: str, tallies: str, config: DataConfig, language: str) -> None:
        super().__init__(folder, tallies, select=language)
        self.splitters = {name: Splitter[rules.splitter] for name, rules in config.rules.items()}
        self.hasher = MinHasher(config.dedup)

    def measure(self, document: Document, before: dict[str, Any]) -> dict[str, Any]:
        splitter = self.splitters[before["rules"]]
        return {"exact": exact_hash(document.text), "keys": self.hasher.keys(document.text, splitter)}
