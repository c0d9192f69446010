"""The body of an HTTP response without its transfer and content codings (RFC 9112 section 7, RFC 9110 section 8.4).

Chunks, gzip, deflate, Zstandard (RFC 8878) and Brotli (RFC 7932) are undone, within the limits on expansion. Archives
differ in whether they keep a body as it was sent or decoded, with the headers left as they were, and servers send
`Content-Encoding: utf-8` and the like: a coding that a header names and the body does not show is taken for undone
already where the body reads like text. Compression by shared dictionaries (dcb, dcz) and by `compress` is left out:
such bodies are set aside as of unknown coding.
"""

import codecs
import io
import re
import zlib
from collections.abc import Callable
from typing import Any

import brotli

from configs.data import ExtractConfig
from data_pipeline.reading.decompression import BLOCK, Fault, is_bomb, members

# Brotli's format has no mark to know it by. Decoded in small pieces: few bytes of it can make very many.
_BROTLI_FEED = 1 << 12
# What text does not begin with; in a compressed body of a few hundred bytes there is one for all practical purposes.
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_TEXT_BYTES = 1024
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class CodingError(ValueError):
    """A body that cannot be decoded."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_body(body: bytes, headers: Any, limits: ExtractConfig) -> bytes:
    """`body` as text or markup. Errors: CodingError."""
    if headers is None:
        return body
    transfer, content = _names(headers.get("Transfer-Encoding")), _names(headers.get("Content-Encoding"))
    if "chunked" in transfer:
        body = _join_chunks(body)
    for coding in reversed([*content, *(name for name in transfer if name != "chunked")]):
        decode = _DECODERS.get(coding)
        decoded = decode(body, limits) if decode else None
        if decoded is None and not _reads_like_text(body):
            raise CodingError("bad_content_encoding" if decode else "unknown_content_encoding")
        body = body if decoded is None else decoded
    return body


def _names(header: str | None) -> list[str]:
    names = [name.strip().lower() for name in (header or "").split(",")]
    return [name for name in names if name not in ("", "identity")]


def _reads_like_text(body: bytes) -> bool:
    head = body[:_TEXT_BYTES]
    return head.startswith(_MARKS) or head.lstrip()[:1] == b"<" or not _CONTROLS.search(head)


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


def _decompress(body: bytes, limits: ExtractConfig) -> bytes | None:
    parts, size = [], 0
    for item in members(io.BytesIO(body), limits, lambda size: None):
        if isinstance(item, Fault):
            raise CodingError("expansion_limit" if item.reason == "expansion_limit" else "bad_content_encoding")
        if not item.compressed:
            return None
        for block in item.blocks():
            size += len(block)
            if size > limits.max_record_bytes:
                raise CodingError("record_too_large")
            parts.append(block)
    return b"".join(parts)


def _inflate(body: bytes, limits: ExtractConfig) -> bytes | None:
    """Deflate comes with or without the header that the standard asks for; text shows neither."""
    for wbits in (zlib.MAX_WBITS, -zlib.MAX_WBITS):
        inflater = zlib.decompressobj(wbits)
        try:
            content = inflater.decompress(body, limits.max_record_bytes)
        except zlib.error:
            continue
        if is_bomb(len(content), len(body) - len(inflater.unconsumed_tail), limits):
            raise CodingError("expansion_limit")
        if inflater.unconsumed_tail:
            raise CodingError("record_too_large")
        if inflater.eof:
            return content
    return None


def _unbrotli(body: bytes, limits: ExtractConfig) -> bytes | None:
    decoder = brotli.Decompressor()
    parts, size, place = list[bytes](), 0, 0
    while not decoder.is_finished():
        fed = body[place : place + _BROTLI_FEED] if decoder.can_accept_more_data() else b""
        place += len(fed)
        try:
            part = decoder.process(fed, output_buffer_limit=BLOCK)
        except brotli.error:
            return None
        if not part and not fed and place == len(body):
            return None  # cut: all is decoded, and it is not the end
        parts.append(part)
        size += len(part)
        if is_bomb(size, place, limits):
            raise CodingError("expansion_limit")
        if size > limits.max_record_bytes:
            raise CodingError("record_too_large")
    return b"".join(parts) if place == len(body) else None


# By name: (body, limits) -> what it holds, None where it does not show that coding.
_DECODERS: dict[str, Callable[[bytes, ExtractConfig], bytes | None]] = {
    "gzip": _decompress,
    "x-gzip": _decompress,
    "zstd": _decompress,
    "deflate": _inflate,
    "br": _unbrotli,
}
