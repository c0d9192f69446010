"""Hashes that are the same on every machine and in every process."""

import hashlib
import json
from typing import Any


def stable_hash(text: str) -> int:
    """64 bits, BLAKE2b of the UTF-8 bytes; lone surrogates pass."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def digest(value: Any) -> str:
    """SHA-256 of a value of JSON; the order of keys does not count, and lone surrogates pass."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
