"""Computes fingerprints (keys) of documents from their texts; duplicates share one.

Exact: a 128-bit hash of the text in lower case, with runs of white space as one space. URL: a 64-bit hash of the
address without scheme, "www." and fragment. MinHash (Broder 1997) with LSH bands as in FineWeb: `bands` x `rows` minima
over word n-grams, of which one 64-bit key per band is kept. Two documents of Jaccard similarity s share a key with
probability 1 - (1 - s^rows)^bands: 0.77 at 0.75 and 0.99 at 0.85 for 14 x 8. Texts without n-grams have no MinHash key
and are compared by the exact hash alone. Each shard's keys are sorted, so that a search for equal keys in a range of
values reads only that range of every shard.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from configs.data import DataConfig
from configs.dedup import DedupConfig
from data_pipeline.core.canary_naming import salt
from data_pipeline.core.hashing import stable_hash
from data_pipeline.core.tables import FileKey, TableStep, file_key
from data_pipeline.reading.document_urls import url_key, url_of
from data_pipeline.scan.folding import plain_bytes
from data_pipeline.scan.minhash import band_keys, signature
from data_pipeline.scan.words import Splitter, mix

EXACT, URL = "exact", "url"  # the two kinds of keys beside the bands
_HALF = np.uint64(0xFFFFFFFFFFFFFFFF)


def exact_hash(text: str) -> int:
    """128-bit hash of a text, equal for texts that differ only in case, white space and Unicode composition."""
    normal = plain_bytes(unicodedata.normalize("NFC", text))
    return int.from_bytes(hashlib.blake2b(normal.data, digest_size=16).digest(), "big")


def kinds_of_keys(settings: DedupConfig) -> list[str]:
    """Names of a document's keys, in the order of their columns."""
    return [EXACT, URL, *(f"band_{band}" for band in range(settings.bands))]


class MinHasher:
    """Computes a text's MinHash keys, which depend on the text and the settings alone."""

    def __init__(self, settings: DedupConfig) -> None:
        self.settings = settings
        count = settings.bands * settings.rows
        seed = np.uint64(stable_hash(f"minhash {settings.seed}"))
        draws = np.array([mix(np.uint64(number) + seed) for number in range(2 * count)], np.uint64)
        self._scale = draws[:count] | np.uint64(1)
        self._shift = draws[count:]

    def signature(self, text: str, splitter: Splitter) -> np.ndarray:
        """Minimum of each hash function over the text's n-grams, uint64 [bands * rows]; empty without n-grams."""
        return signature(text, splitter.window(self.settings.ngram), self._scale, self._shift)

    def keys(self, text: str, splitter: Splitter) -> np.ndarray:
        """MinHash keys of a text, uint64 [bands]; all 0, which means no key, for a text without n-grams."""
        found = self.signature(text, splitter)
        return band_keys(found, self.settings.bands) if len(found) else np.zeros(self.settings.bands, np.uint64)


class SignDocuments(TableStep):
    """Step that computes the fingerprints of all documents that the language stage kept, and writes them.

    The table gets the lower half of the exact hash and the URL hash; `write_keys` writes all keys.
    """

    name = "Signatures"

    def __init__(self, folder: str, tallies: str, config: DataConfig, language: str) -> None:
        super().__init__(folder, tallies, select=language)
        self.splitters = {name: Splitter[rules.splitter] for name, rules in config.rules.items()}
        self.hasher = MinHasher(config.dedup)

    def measure(self, document: Document, before: dict[str, Any]) -> dict[str, Any]:
        exact = exact_hash(document.text)
        keys = np.empty(2 + self.hasher.settings.bands, np.uint64)
        keys[0], keys[1] = exact >> 64, url_key(url_of(document.metadata))
        keys[2:] = self.hasher.keys(document.text, self.splitters[before["rules"]])
        keys[keys != 0] ^= np.uint64(salt(document.metadata["shard"]))
        return {"exact": np.uint64(exact & int(_HALF)), "url": keys[1], "keys": keys}

    def write(self, shard: str, rows: Sequence[dict[str, Any]]) -> None:
        keys = np.stack([row.pop("keys") for row in rows])
        write_keys(Path(self.folder), shard, keys, np.array([row["row"] for row in rows]))
        super().write(shard, rows)


def write_keys(folder: Path, shard: str, keys: np.ndarray, rows: np.ndarray) -> None:
    """Writes a shard's keys, uint64 [documents, kinds], transposed and each kind sorted.

    `<shard>.keys.npy` is uint64 [kinds, documents], each kind ascending; `<shard>.rows.npy`, uint32 of the same shape,
    holds the row in the shard of each key's document.
    """
    (folder / shard).parent.mkdir(parents=True, exist_ok=True)
    order = np.argsort(keys.T, axis=1, kind="stable")
    np.save(folder / f"{shard}.keys.npy", np.take_along_axis(keys.T, order, axis=1))
    np.save(folder / f"{shard}.rows.npy", rows.astype(np.uint32)[order])


def read_range(folder: str | Path, shard: str, kind: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads the keys of one kind with low <= key <= high: (keys uint64 [n], rows uint32 [n]); maps the files."""
    keys = _mapped(Path(folder) / f"{shard}.keys.npy")[kind]
    first = np.searchsorted(keys, np.uint64(low), side="left")
    last = np.searchsorted(keys, np.uint64(high), side="right")
    rows = _mapped(Path(folder) / f"{shard}.rows.npy")[kind]
    return np.array(keys[first:last]), np.array(rows[first:last])


def _mapped(path: Path) -> np.ndarray:
    return _opened(path, file_key(path))


@functools.lru_cache(maxsize=16)
def _opened(path: Path, _: FileKey) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))
