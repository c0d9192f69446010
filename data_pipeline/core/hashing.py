"""Hashes that are the same on every machine and in every process."""

import hashlib
import json
from typing import Any


def stable_hash(text: str) -> int:
    """Returns a 64-bit BLAKE2b hash of the text's UTF-8 bytes; lone surrogates are accepted."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def draw(seed: int, text: str) -> float:
    """Returns a pseudo-random number in [0, 1) that depends on seed and text alone."""
    return stable_hash(f"{seed}\0{text}") / 2**64


def digest(value: Any) -> str:
    """SHA-256, in hex, of a value that JSON can hold; keys are sorted first, and lone surrogates are accepted."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
