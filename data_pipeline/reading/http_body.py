"""The body of an HTTP response without its transfer and content codings (RFC 9112 section 7, RFC 9110 section 8.4).

Chunks, gzip, deflate, Zstandard (RFC 8878) and Brotli (RFC 7932) are undone, within the limits on expansion. Archives
differ in whether they keep a body as it was sent or decoded, with the headers left as they were, and servers send
`Content-Encoding: utf-8` and the like: a coding that a header names and the body does not show is taken for undone
already where the body reads like text, and a body that shows its coding without a header that names it is decoded as
well. Chunks may end their lines with bare line feeds; where sizes and data contradict each other the body is set aside,
since what is left of it would have sizes in its text. Compression by shared dictionaries (dcb, dcz) and by `compress`
is left out: such bodies are set aside as of unknown coding.
"""

import codecs
import io
import re
import zlib
from collections.abc import Callable

import brotli

from configs.sources import ExtractConfig
from data_pipeline.reading.decompression import BLOCK, Fault, is_bomb, members
from data_pipeline.reading.http_response import Response

# Brotli's format has no mark to know it by. Decoded in small pieces: few bytes of it can make very many.
_BROTLI_FEED = 1 << 12
# What text does not begin with; in a compressed body of a few hundred bytes there is one for all practical purposes.
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_TEXT_BYTES = 1024
_CHUNK_HEAD = re.compile(rb"\s*([0-9A-Fa-f]{1,15})[\t ]*(?:;[^\r\n]{0,4096})?(\r?\n|\Z)")
_COMPRESSED = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd")
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class CodingError(ValueError):
    """A body that cannot be decoded."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_body(body: bytes, response: Response, limits: ExtractConfig) -> bytes:
    """`body` as text or markup. Errors: CodingError."""
    transfer, content = _names(response.all("transfer-encoding")), _names(response.all("content-encoding"))
    for _ in range(max(1, transfer.count("chunked"))):
        body = _join_chunks(body, "chunked" in transfer)
    for coding in reversed([*content, *(name for name in transfer if name != "chunked")]):
        decode = _DECODERS.get(coding)
        decoded = decode(body, limits) if decode else None
        if decoded is None and not _reads_like_text(body) and not body.startswith(_COMPRESSED):
            raise CodingError("bad_content_encoding" if decode else "unknown_content_encoding")
        body = body if decoded is None else decoded
    if body.startswith(_COMPRESSED):  # the header that said so was not kept
        body = _decompress(body, limits) or b""
    return body


def _names(header: str) -> list[str]:
    names = [name.strip().lower() for name in header.split(",")]
    return [name for name in names if name not in ("", "identity")]


def _reads_like_text(body: bytes) -> bool:
    head = body[:_TEXT_BYTES]
    return head.startswith(_MARKS) or head.lstrip()[:1] == b"<" or not _CONTROLS.search(head)


def _join_chunks(body: bytes, declared: bool) -> bytes:
    """`body` without chunk sizes; itself where it does not begin with one, or unless `declared` where it is not whole.

    Errors: CodingError for a declared body that breaks off within a chunk, or whose sizes are wrong.
    """
    parts, position = list[bytes](), 0
    while head := _CHUNK_HEAD.match(body, position):
        size = int(head[1], 16)
        if size == 0:
            return b"".join(parts) if parts or declared else body  # what may follow are trailers
        position = head.end() + size
        parts.append(body[head.end() : position])
        if not body.startswith(head[2], position):
            break
        position += len(head[2])
    if not parts or not declared:
        return body  # the archive holds it joined
    if position > len(body) or body[position:].strip():
        raise CodingError("bad_content_encoding")
    return b"".join(parts)  # only the last chunk, the empty one, is missing


def _decompress(body: bytes, limits: ExtractConfig) -> bytes | None:
    parts, size = list[bytes](), 0
    for item in members(io.BytesIO(body), limits, lambda size: None):
        if isinstance(item, Fault):
            if parts and not body[item.offset :].strip(b"\r\n"):
                break  # a line end that a server or archive has put behind it
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
    parts, size, position = list[bytes](), 0, 0
    while not decoder.is_finished():
        fed = body[position : position + _BROTLI_FEED] if decoder.can_accept_more_data() else b""
        position += len(fed)
        try:
            part = decoder.process(fed, output_buffer_limit=BLOCK)
        except brotli.error:
            return None
        if not part and not fed and position == len(body):
            return None  # cut: all is decoded, and it is not the end
        parts.append(part)
        size += len(part)
        if is_bomb(size, position, limits):
            raise CodingError("expansion_limit")
        if size > limits.max_record_bytes:
            raise CodingError("record_too_large")
    return b"".join(parts) if position == len(body) else None


# By name: (body, limits) -> what it holds, None where it does not show that coding.
_DECODERS: dict[str, Callable[[bytes, ExtractConfig], bytes | None]] = {
    "gzip": _decompress,
    "x-gzip": _decompress,
    "zstd": _decompress,
    "deflate": _inflate,
    "br": _unbrotli,
}
