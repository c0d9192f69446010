"""The body of an HTTP response without its transfer and content codings (RFC 9112 section 7, RFC 9110 section 8.4).

Archives differ in whether they keep a body as it was sent or decoded, with the headers left as they were: a coding that
a header names and the body does not show is taken for undone already. Brotli is left out.
"""

import io
import zlib
from typing import Any

from configs.data import ExtractConfig
from data_pipeline.reading.decompression import Fault, members


class CodingError(ValueError):
    """A body that cannot be decoded."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_body(body: bytes, headers: Any, limits: ExtractConfig) -> bytes:
    """`body` as text or markup. Errors: CodingError."""
    if headers is None:
        return body
    if "chunked" in (headers.get("Transfer-Encoding") or "").lower():
        body = _join_chunks(body)
    codings = [name.strip().lower() for name in (headers.get("Content-Encoding") or "").split(",")]
    for coding in reversed(codings):
        if coding in ("gzip", "x-gzip", "zstd"):
            body = _decompress(body, limits)
        elif coding == "deflate":
            body = _inflate(body, limits)
        elif coding == "br" and body.lstrip()[:1] != b"<":
            raise CodingError("bad_content_encoding")
    return body


def _join_chunks(body: bytes) -> bytes:
    parts, place = list[bytes](), 0
    while place < len(body):
        end = body.find(b"\r\n", place, place + 1024)
        try:
            size = int(body[place:end].split(b";")[0], 16) if end >= 0 else -1
        except ValueError:
            size = -1
        if size < 0:
            if not parts:
                return body  # no chunks: the archive holds it joined
            raise CodingError("bad_content_encoding")
        if size == 0:
            break
        if end + 2 + size > len(body):
            raise CodingError("bad_content_encoding")
        parts.append(body[end + 2 : end + 2 + size])
        place = end + 2 + size + 2
    return b"".join(parts)


def _decompress(body: bytes, limits: ExtractConfig) -> bytes:
    parts, size = [], 0
    for item in members(io.BytesIO(body), limits, lambda size: None):
        if isinstance(item, Fault):
            raise CodingError("expansion_limit" if item.reason == "expansion_limit" else "bad_content_encoding")
        for block in item.blocks():
            size += len(block)
            if size > limits.max_record_bytes:
                raise CodingError("record_too_large")
            parts.append(block)
    return b"".join(parts)


def _inflate(body: bytes, limits: ExtractConfig) -> bytes:
    """Deflate comes with or without the header that the standard asks for; text shows neither."""
    for wbits in (zlib.MAX_WBITS, -zlib.MAX_WBITS):
        inflater = zlib.decompressobj(wbits)
        try:
            content = inflater.decompress(body, limits.max_record_bytes)
        except zlib.error:
            continue
        if inflater.unconsumed_tail:
            raise CodingError("record_too_large")
        if inflater.eof:
            return content
    return body
