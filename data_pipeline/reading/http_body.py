"""Decoder of HTTP bodies: undoes transfer and content codings (RFC 9112 section 7, RFC 9110 section 8.4).

Chunks, gzip, deflate, Zstandard (RFC 8878) and Brotli (RFC 7932) are decoded, within the limits on expansion. Some
archives store a body as it was sent, others store it decoded and keep the headers, and some servers send nonsense such
as `Content-Encoding: utf-8`. So if a header names a coding that the body is not in, and the body reads like text, it is
taken as decoded already; and a body that is visibly compressed is decoded even if no header says so. Zeros, spaces and
line ends after a compressed body are padding. Chunk lines may end with bare line feeds, and chunks hold chunks. If
chunk sizes and data contradict each other the body is set aside, since chunk sizes would remain in its text.
Compression with shared dictionaries (dcb, dcz) and `compress` are not supported: such bodies are set aside with the
reason unknown_content_encoding.
"""

import codecs
import contextlib
import io
import re
import zlib
from collections.abc import Callable, Sequence

import brotli

from configs.sources import ExtractConfig
from data_pipeline.reading.decompression import BLOCK, Fault, is_bomb, members
from data_pipeline.reading.http_response import Response

# Bytes of Brotli that are decoded at once. They are few, since a few bytes can expand to very many.
_BROTLI_FEED = 1 << 12
# Control characters, which text does not contain and a compressed body of a few hundred bytes practically always does.
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_TEXT_BYTES = 1024
_CHUNK_HEAD = re.compile(rb"\s*([0-9A-Fa-f]{1,15})[\t ]*(?:;[^\r\n]{0,4096})?(\r?\n|\Z)")
# A size that is not written as the standard says: with 0x or a sign, before a bare carriage return or with an extension
# that holds one.
_ODD_CHUNK_HEAD = re.compile(
    rb"\s*(?:(?:0x|[+-])[0-9A-Fa-f]{1,15}[\t ]*[\r\n]|[0-9A-Fa-f]{1,15}[\t ]*(?:\r[^\n]|;[^\n<]*\n))"
)
_PADDING = b"\0 \r\n"  # what servers and archives put after a compressed body
_LAST_ZEROS = 4
_COMPRESSED = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd")
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class CodingError(ValueError):
    """Raised for a body that cannot be decoded; `reason` is one of `records.BROKEN`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_body(body: bytes, response: Response, limits: ExtractConfig) -> bytes:
    """Undoes the codings of `body` that the headers name or its first bytes show; raises CodingError if it cannot."""
    transfer, content = _names(response.all("transfer-encoding")), _names(response.all("content-encoding"))
    body = _join_inner(_join_chunks(body, "chunked" in transfer))
    for coding in reversed([*content, *(name for name in transfer if name != "chunked")]):
        decode = _DECODERS.get(coding)
        decoded = decode(body, limits) if decode else None
        if decoded is None and not _reads_like_text(body) and not body.startswith(_COMPRESSED):
            raise CodingError("bad_content_encoding" if decode else "unknown_content_encoding")
        body = body if decoded is None else _join_inner(decoded)
    if body.startswith(_COMPRESSED):  # compressed, though no header says so
        body = _join_inner(_decompress(body, limits) or b"")
    return body


def _join_inner(body: bytes) -> bytes:
    """Joins chunks that no header speaks of: a proxy or archive has made chunks of chunks, or compressed them."""
    with contextlib.suppress(CodingError):
        while (inner := _join_chunks(body, declared=False)) != body:
            body = inner
    return body


def _names(header: str) -> list[str]:
    """Returns the codings that a header lists, in lower case, without "identity"."""
    names = [name.strip().lower() for name in header.split(",")]
    return [name for name in names if name not in ("", "identity")]


def _reads_like_text(body: bytes) -> bool:
    head = body[:_TEXT_BYTES]
    return head.startswith(_MARKS) or head.lstrip()[:1] == b"<" or not _CONTROLS.search(head)


def _join_chunks(body: bytes, declared: bool) -> bytes:
    """Joins the chunks of `body`; returns it unchanged if it is not chunked.

    `declared` says whether a header names chunks. Without it, a body is taken for chunks if it is a complete
    sequence of them, or if the first holds the beginning of markup or of compressed data. CodingError is raised for
    chunks that end in the middle of one, or whose sizes are wrong.
    """
    parts, position = list[bytes](), 0
    while head := _CHUNK_HEAD.match(body, position):
        size = int(head[1], 16)
        if size == 0:
            return b"".join(parts) if parts or declared else body  # what may follow are trailers
        position = head.end() + size
        parts.append(body[head.end() : position])
        ends = (b"\r\n", b"\n") if head[2] == b"\n" else (head[2],)
        end = next((end for end in ends if body.startswith(end, position)), None)
        if end is None:
            break
        position += len(end)
    begins = parts[0].lstrip() if parts else b""
    is_chunked = declared or begins.startswith((b"<", *_COMPRESSED))
    if not is_chunked or (not parts and not _ODD_CHUNK_HEAD.match(body)):
        return body  # the archive stores the chunks joined
    if not parts or position > len(body) or body[position:].strip():
        raise CodingError("bad_content_encoding")
    return b"".join(parts)  # only the last chunk, the empty one, is missing


def _decompress(body: bytes, limits: ExtractConfig) -> bytes | None:
    """Decodes gzip or Zstandard, recognized by its first bytes; None if `body` is neither."""
    parts, size = list[bytes](), 0
    for item in members(io.BytesIO(body), limits, lambda size: None):
        if isinstance(item, Fault):
            if parts and not body[item.offset :].strip(_PADDING):
                break
            raise CodingError("expansion_limit" if item.reason == "expansion_limit" else "bad_content_encoding")
        if not item.compressed:
            return None
        for block in item.blocks():
            size += len(block)
            if size > limits.max_record_bytes:
                raise CodingError("record_too_large")
            parts.append(block)
    return b"".join(parts)


def _gunzip(body: bytes, limits: ExtractConfig) -> bytes | None:
    """Decodes gzip, Zstandard, or deflate with its zlib header, which some servers call gzip; None if it is neither."""
    found = _decompress(body, limits)
    return _inflate(body, limits, (zlib.MAX_WBITS,)) if found is None else found


def _inflate(
    body: bytes, limits: ExtractConfig, forms: Sequence[int] = (zlib.MAX_WBITS, -zlib.MAX_WBITS)
) -> bytes | None:
    """Decodes deflate with or without the zlib header that the standard asks for; None if `body` is not deflate."""
    for wbits in forms:
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
    """Decodes Brotli; None if `body` is not a complete Brotli stream, with or without padding after it."""
    bare = len(body.rstrip(_PADDING))
    # The stream itself may end in bytes that are like padding.
    ends = [len(body), *range(bare, min(bare + _LAST_ZEROS, len(body)))]
    return next((found for end in ends if (found := _unbrotli_whole(body[:end], limits)) is not None), None)


def _unbrotli_whole(body: bytes, limits: ExtractConfig) -> bytes | None:
    """Decodes Brotli; None if `body` is not exactly one Brotli stream."""
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
            return None  # truncated: all bytes are decoded and the stream has not ended
        parts.append(part)
        size += len(part)
        if is_bomb(size, position, limits):
            raise CodingError("expansion_limit")
        if size > limits.max_record_bytes:
            raise CodingError("record_too_large")
    return b"".join(parts) if position == len(body) else None


# Coding -> function of (body, limits) that returns the decoded body, or None if the body is not in that coding.
_DECODERS: dict[str, Callable[[bytes, ExtractConfig], bytes | None]] = {
    "gzip": _gunzip,
    "x-gzip": _gunzip,
    "zstd": _decompress,
    "deflate": _inflate,
    "x-deflate": _inflate,
    "br": _unbrotli,
}
