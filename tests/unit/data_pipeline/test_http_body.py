"""Bodies in every coding that archives hold, undone already or not, cut or made to burst."""

import gzip
import os
import zlib
from functools import partial
from pathlib import Path

import brotli
import pytest
import zstandard

from configs.data import ExtractConfig, SourceConfig
from data_pipeline.reading.http_body import CodingError, decode_body
from data_pipeline.reading.records import FoundFile
from data_pipeline.reading.source import read_file
from tests.unit.data_pipeline.conftest import DEMO
from tests.unit.data_pipeline.test_reading import read, reasons, warc

PAGE = b"<p>Call me Ishmael.</p>" * 50
PLAIN = b"Call me Ishmael. Some years ago, never mind how long precisely."
RAW_DEFLATE = zlib.compress(PAGE)[2:-4]  # what some servers send: RFC 1951 without the header of RFC 1950
zipped = partial(gzip.compress, mtime=0)  # the time of day is in a test's name otherwise


def chunked(body: bytes, size: int = 100) -> bytes:
    parts = [body[place : place + size] for place in range(0, len(body), size)]
    return b"".join(b"%x;name=value\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (PAGE, {}),
        (zipped(PAGE), {"Content-Encoding": "gzip"}),
        (zipped(PAGE), {"Content-Encoding": "X-GZIP"}),
        (zstandard.compress(PAGE), {"Content-Encoding": "zstd"}),
        (zlib.compress(PAGE), {"Content-Encoding": "deflate"}),
        (RAW_DEFLATE, {"Content-Encoding": "deflate"}),
        (brotli.compress(PAGE), {"Content-Encoding": "br"}),
        (chunked(PAGE), {"Transfer-Encoding": "chunked"}),
        (chunked(zipped(PAGE)), {"Transfer-Encoding": "chunked", "Content-Encoding": "gzip"}),
        (chunked(brotli.compress(PAGE), 7), {"Transfer-Encoding": "chunked", "Content-Encoding": "br"}),
        (chunked(zstandard.compress(PAGE)), {"Transfer-Encoding": "Chunked", "Content-Encoding": "zstd"}),
        (
            chunked(zipped(brotli.compress(PAGE))),
            {"Transfer-Encoding": "gzip, chunked", "Content-Encoding": "br"},
        ),
        (zipped(zlib.compress(PAGE)), {"Content-Encoding": "deflate, gzip"}),
        # Headers of codings that the archive has undone.
        (PAGE, {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}),
        (PAGE, {"Content-Encoding": "deflate"}),
        (PAGE, {"Content-Encoding": "br"}),
        (PLAIN, {"Content-Encoding": "br"}),
        # Names that servers send of what is no coding.
        (PAGE, {"Content-Encoding": "utf-8"}),
        (PLAIN, {"Content-Encoding": "identity"}),
        ("话说天下大势，分久必合".encode("gb18030"), {"Content-Encoding": "none"}),
    ],
)
def test_a_body_is_decoded_as_its_headers_say(body: bytes, headers: dict[str, str]) -> None:
    expected = body if body == PLAIN or headers.get("Content-Encoding") == "none" else PAGE
    assert decode_body(body, headers, ExtractConfig()) == expected


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        (zipped(PAGE)[:40], {"Content-Encoding": "gzip"}, "bad_content_encoding"),
        (chunked(PAGE)[:110], {"Transfer-Encoding": "chunked"}, "bad_content_encoding"),
        (chunked(PAGE)[:117] + b"zz\r\n", {"Transfer-Encoding": "chunked"}, "bad_content_encoding"),
        (b"\x8b\x02\x80", {"Content-Encoding": "br"}, "bad_content_encoding"),
        (brotli.compress(os.urandom(500))[:200], {"Content-Encoding": "br"}, "bad_content_encoding"),
        (brotli.compress(PAGE) + os.urandom(5000), {"Content-Encoding": "br"}, "bad_content_encoding"),
        (b"\x1f\x9d\x90" + os.urandom(500), {"Content-Encoding": "compress"}, "unknown_content_encoding"),
        (os.urandom(500), {"Content-Encoding": "dcz"}, "unknown_content_encoding"),
        (os.urandom(500), {"Content-Encoding": "gzip"}, "bad_content_encoding"),
        (zipped(b"a" * 5_000_000), {"Content-Encoding": "gzip"}, "expansion_limit"),
        (brotli.compress(b"a" * 5_000_000), {"Content-Encoding": "br"}, "expansion_limit"),
        (zlib.compress(b"a" * 5_000_000), {"Content-Encoding": "deflate"}, "expansion_limit"),
        (zstandard.compress(b"a" * 5_000_000), {"Content-Encoding": "zstd"}, "expansion_limit"),
        (zlib.compress(b"a" * 50_000), {"Content-Encoding": "deflate"}, "record_too_large"),
        (zipped(b"a" * 50_000), {"Content-Encoding": "gzip"}, "record_too_large"),
        (brotli.compress(b"a" * 50_000), {"Content-Encoding": "br"}, "record_too_large"),
    ],
)
def test_a_body_that_cannot_be_decoded(body: bytes, headers: dict[str, str], reason: str) -> None:
    limits = ExtractConfig(max_record_bytes=10_000 if reason == "record_too_large" else 16_000_000)
    with pytest.raises(CodingError) as caught:
        decode_body(body, headers, limits)
    assert caught.value.reason == reason


def test_brotli_of_every_size_comes_out_whole() -> None:
    """Across the decoder's blocks in both directions: what goes in at a time, and what comes out."""
    for size in (0, 1, 4_095, 4_096, 65_535, 65_536, 65_537, 1_000_000):
        for content in (os.urandom(size), b"".join(b"%d " % (number * number) for number in range(size // 6))):
            headers = {"Content-Encoding": "br"}
            assert decode_body(brotli.compress(content, quality=3), headers, ExtractConfig()) == content


@pytest.mark.parametrize("coding", ["br", "br, zstd"])
def test_pages_of_the_demo_sent_in_another_coding_are_the_same_pages(tmp_path: Path, coding: str) -> None:
    source = SourceConfig(files=("-",), format="warc", rules={"any": "r"})
    file = FoundFile(str(DEMO / "web.warc.gz"), 1)
    pages = []
    for record in read_file(file, source, ExtractConfig(), lambda size: None):
        pages.append(record.text)
        if len(pages) == 60:
            break
    bodies = [page.encode() for page in pages]
    for name in coding.split(", "):
        bodies = [brotli.compress(body, quality=4) if name == "br" else zstandard.compress(body) for body in bodies]
    bodies = [chunked(body, 999) if number % 2 else body for number, body in enumerate(bodies)]
    headers = [("Content-Encoding", coding)]
    members = [
        warc([body], extra=[*headers, ("Transfer-Encoding", "chunked")] if number % 2 else headers)[0]
        for number, body in enumerate(bodies)
    ]
    bomb = warc([brotli.compress(b"<p>" + b"a" * 20_000_000, quality=1)], extra=[("Content-Encoding", "br")])[0]
    strange = warc([os.urandom(3000)], extra=[("Content-Encoding", "sdch")])[0]
    content = b"".join([*members[:30], bomb, strange, *members[30:]])
    records = read(tmp_path / "a.warc.gz", content, "warc")
    assert reasons(records) == [""] * 30 + ["expansion_limit", "unknown_content_encoding"] + [""] * 30
    assert [record.text for record in records if not record.reason] == pages
    assert records[30].position == sum(map(len, members[:30]))
