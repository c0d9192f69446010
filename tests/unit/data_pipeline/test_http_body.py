"""Bodies in every coding that archives hold, undone already or not, cut or made to burst."""

import gzip
import zlib

import pytest
import zstandard

from configs.data import ExtractConfig
from data_pipeline.reading.http_body import CodingError, decode_body

PAGE = b"<p>Call me Ishmael.</p>" * 50
RAW_DEFLATE = zlib.compress(PAGE)[2:-4]  # what some servers send: RFC 1951 without the header of RFC 1950


def chunked(body: bytes, size: int = 100) -> bytes:
    parts = [body[place : place + size] for place in range(0, len(body), size)]
    return b"".join(b"%x;name=value\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (PAGE, {}),
        (gzip.compress(PAGE), {"Content-Encoding": "gzip"}),
        (gzip.compress(PAGE), {"Content-Encoding": "X-GZIP"}),
        (zstandard.compress(PAGE), {"Content-Encoding": "zstd"}),
        (zlib.compress(PAGE), {"Content-Encoding": "deflate"}),
        (RAW_DEFLATE, {"Content-Encoding": "deflate"}),
        (chunked(PAGE), {"Transfer-Encoding": "chunked"}),
        (chunked(gzip.compress(PAGE)), {"Transfer-Encoding": "chunked", "Content-Encoding": "gzip"}),
        (gzip.compress(zlib.compress(PAGE)), {"Content-Encoding": "deflate, gzip"}),
        # Headers of codings that the archive has undone.
        (PAGE, {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}),
        (PAGE, {"Content-Encoding": "deflate"}),
        (PAGE, {"Content-Encoding": "br"}),
    ],
)
def test_a_body_is_decoded_as_its_headers_say(body: bytes, headers: dict[str, str]) -> None:
    assert decode_body(body, headers, ExtractConfig()) == PAGE


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        (gzip.compress(PAGE)[:40], {"Content-Encoding": "gzip"}, "bad_content_encoding"),
        (chunked(PAGE)[:110], {"Transfer-Encoding": "chunked"}, "bad_content_encoding"),
        (chunked(PAGE)[:117] + b"zz\r\n", {"Transfer-Encoding": "chunked"}, "bad_content_encoding"),
        (b"\x8b\x02\x80", {"Content-Encoding": "br"}, "bad_content_encoding"),
        (gzip.compress(b"a" * 5_000_000), {"Content-Encoding": "gzip"}, "expansion_limit"),
        (zlib.compress(b"a" * 50_000), {"Content-Encoding": "deflate"}, "record_too_large"),
        (gzip.compress(b"a" * 50_000), {"Content-Encoding": "gzip"}, "record_too_large"),
    ],
)
def test_a_body_that_cannot_be_decoded(body: bytes, headers: dict[str, str], reason: str) -> None:
    limits = ExtractConfig(max_record_bytes=10_000 if reason == "record_too_large" else 16_000_000)
    with pytest.raises(CodingError) as caught:
        decode_body(body, headers, limits)
    assert caught.value.reason == reason
