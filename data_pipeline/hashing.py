"""A hash of strings that is the same on every machine and in every process."""

import hashlib


def stable_hash(text: str) -> int:
    """64 bits, BLAKE2b of the UTF-8 bytes; lone surrogates pass."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
