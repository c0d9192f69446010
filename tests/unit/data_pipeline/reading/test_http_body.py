"""Tests HTTP bodies in all codings found in archives: decoded before or not, truncated, or decompression bombs."""

import gzip
import os
import zlib
from functools import partial
from pathlib import Path

import brotli
import pytest
import zstandard

from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.http_body import CodingError, decode_body
from data_pipeline.reading.http_response import Response
from data_pipeline.reading.input_records import FoundFile
from data_pipeline.reading.source_reader import read_file
from tests.demo_corpus import DEMO
from tests.unit.data_pipeline.reading.raw_files import read, reasons, warc

PAGE = b"<p>Call me Ishmael.</p>" * 50
PLAIN = b"Call me Ishmael. Some years ago, never mind how long precisely."
RAW_DEFLATE = zlib.compress(PAGE)[2:-4]  # some servers send RFC 1951 without the header of RFC 1950
PADDING = (b"\r\n", b"\n", bytes(512), b"\r\n\0\0", b"\0\0\r\n", b"  ")
zipped = partial(gzip.compress, mtime=0)  # else the time of day would be in test names


def response(headers: dict[str, str]) -> Response:
    return Response(200, [(name.lower(), value) for name, value in headers.items()])


def chunked(body: bytes, size: int = 100) -> bytes:
    parts = [body[position : position + size] for position in range(0, len(body), size)]
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
        (chunked(PAGE).replace(b"value\r\n", b"value\n", 3), {"Transfer-Encoding": "chunked"}),
        (chunked(zipped(PAGE)), {"Transfer-Encoding": "chunked", "Content-Encoding": "gzip"}),
        (chunked(brotli.compress(PAGE), 7), {"Transfer-Encoding": "chunked", "Content-Encoding": "br"}),
        (chunked(zstandard.compress(PAGE)), {"Transfer-Encoding": "Chunked", "Content-Encoding": "zstd"}),
        (
            chunked(zipped(brotli.compress(PAGE))),
            {"Transfer-Encoding": "gzip, chunked", "Content-Encoding": "br"},
        ),
        (zipped(zlib.compress(PAGE)), {"Content-Encoding": "deflate, gzip"}),
        # Chunks within a compressed body.
        (zipped(chunked(PAGE)), {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}),
        (brotli.compress(chunked(PAGE)), {"Content-Encoding": "br"}),
        (zipped(chunked(PAGE)), {}),
        # Headers name codings that the archive has undone.
        (PAGE, {"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}),
        (PAGE, {"Content-Encoding": "deflate"}),
        (PAGE, {"Content-Encoding": "br"}),
        (PLAIN, {"Content-Encoding": "br"}),
        # Headers name another coding than the body has; a line end follows the body.
        (zipped(PAGE), {"Content-Encoding": "br"}),
        (zstandard.compress(PAGE), {"Content-Encoding": "gzip, compress"}),
        (zlib.compress(PAGE), {"Content-Encoding": "gzip"}),
        (zlib.compress(PAGE), {"Content-Encoding": "x-deflate"}),
        *((zipped(PAGE) + end, {"Content-Encoding": "gzip"}) for end in PADDING),
        *((zstandard.compress(PAGE) + end, {"Content-Encoding": "zstd"}) for end in PADDING),
        *((brotli.compress(PAGE) + end, {"Content-Encoding": "br"}) for end in PADDING),
        *((zlib.compress(PAGE) + end, {"Content-Encoding": "deflate"}) for end in PADDING),
        # Headers name something that is not a coding, as some servers do.
        (PAGE, {"Content-Encoding": "utf-8"}),
        (PLAIN, {"Content-Encoding": "identity"}),
        ("话说天下大势，分久必合".encode("gb18030"), {"Content-Encoding": "none"}),
    ],
)
def test_a_body_is_decoded_as_its_headers_say(body: bytes, headers: dict[str, str]) -> None:
    expected = body if body == PLAIN or headers.get("Content-Encoding") == "none" else PAGE
    assert decode_body(body, response(headers), ExtractConfig()) == expected


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        (zipped(PAGE)[:40], {"Content-Encoding": "gzip"}, "bad_content_encoding"),
        (chunked(PAGE)[:110], {"Transfer-Encoding": "chunked"}, "bad_content_encoding"),
        (chunked(PAGE)[:117] + b"zz\r\n", {"Transfer-Encoding": "chunked"}, "bad_content_encoding"),
        (chunked(PAGE).replace(b"=value", b'="\r"'), {"Transfer-Encoding": "chunked"}, "bad_content_encoding"),
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
        decode_body(body, response(headers), limits)
    assert caught.value.reason == reason


def chunks(*parts: bytes, end: bytes = b"\r\n", size: str = "{:x}", last: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(size.format(len(part)).encode() + end + part + end for part in parts) + last


PARTS = (PAGE[:500], PAGE[500:501], PAGE[501:])
CHUNKED = {"Transfer-Encoding": "chunked"}


@pytest.mark.parametrize(
    "body",
    [
        chunks(*PARTS),
        chunks(*PARTS, end=b"\n", last=b"0\n\n"),
        chunks(*PARTS, size="{:X}"),
        chunks(*PARTS, size="{:08X}"),
        chunks(*PARTS, size="{:x}    "),  # Apache pads sizes
        chunks(*PARTS, size='{:x} ; a="b;c" ;d'),
        chunks(*PARTS, last=b"0\r\nExpires: never\r\nX-Sum: 1f4\r\n\r\n"),
        chunks(*PARTS, last=b"0"),
        chunks(*PARTS, last=b""),
        chunks(*PARTS)[:-2],
        b"\r\n" + chunks(*PARTS),
        chunks(chunks(*PARTS)[:700], chunks(*PARTS)[700:]),  # chunks of chunks
        chunks(chunks(*PARTS, end=b"\n", last=b"0\n\n")),
        PAGE,  # the crawler joined the chunks and kept the header
    ],
    ids=range(14),
)
def test_chunks_in_every_form(body: bytes) -> None:
    assert decode_body(body, response(CHUNKED), ExtractConfig()) == PAGE
    assert decode_body(body, response({"X-Crawl-Transfer-Encoding": "chunked"} | CHUNKED), ExtractConfig()) == PAGE


@pytest.mark.parametrize(
    "body",
    [
        chunks(*PARTS)[:900],  # truncated within a chunk
        chunks(*PARTS, last=b"")[:500],
        chunks(*PARTS).replace(b"1f4\r\n", b"1f5\r\n"),  # sizes differ from the data's
        chunks(*PARTS).replace(b"1f4\r\n", b"1f3\r\n"),
        chunks(*PARTS).replace(b"1f4\r\n", b"ffffffffff\r\n"),
        chunks(*PARTS).replace(b"\r\n1\r\n", b"\r\nxyz\r\n"),
        chunks(*PARTS, end=b"\n", last=b"0\n\n").replace(b"1f4\n", b"1f0\n"),
        chunks(*PARTS, last=b"<p>and more"),
        b"0x" + chunks(*PARTS),
        b"-" + chunks(*PARTS),
        chunks(*PARTS).replace(b"\r\n", b"\r"),
    ],
    ids=range(11),
)
def test_broken_chunks_never_get_into_the_text(body: bytes) -> None:
    with pytest.raises(CodingError, match="bad_content_encoding"):
        decode_body(body, response(CHUNKED), ExtractConfig())


def test_codings_that_no_header_names() -> None:
    for body in (chunks(*PARTS), zipped(PAGE), zstandard.compress(PAGE), chunks(zipped(PAGE))):
        assert decode_body(body, response({"X-Crawl-Content-Encoding": "gzip"}), ExtractConfig()) == PAGE
    for body in (b"2024\r\nwas a year", b"0", b"0\r\n\r\n", b"3\nabc\n5\nwords and more"):
        # Such a body is incomplete, so the number may be part of a text.
        assert decode_body(body, response({}), ExtractConfig()) == body
    assert decode_body(chunks(*PARTS, last=b""), response({}), ExtractConfig()) == PAGE  # no text begins with 1f4 and <
    for body in (chunks(*PARTS)[:900], chunks(*PARTS)[:300], chunks(zipped(PAGE))[:40]):
        with pytest.raises(CodingError, match="bad_content_encoding"):
            decode_body(body, response({}), ExtractConfig())
    twice = [("transfer-encoding", "gzip"), ("transfer-encoding", "chunked"), ("content-encoding", "br")]
    body = chunked(zipped(brotli.compress(PAGE)) + b"\0" * 700)
    assert decode_body(body, Response(200, twice), ExtractConfig()) == PAGE


def stored(
    http: bytes, kind: str = "application/http; msgtype=response", more: str = "", of: str = "response"
) -> bytes:
    """Makes a WARC record with `http` as its content."""
    head = f"WARC/1.0\r\nWARC-Type: {of}\r\nWARC-Target-URI: http://example.org/\r\nContent-Type: {kind}\r\n{more}"
    return f"{head}Content-Length: {len(http)}\r\n\r\n".encode() + http + b"\r\n\r\n"


HTML = b"Content-Type: text/html\r\n"
OPENING = (
    b"section",
    b"article class='a'",
    b"Main",
    b"header",
    b"nav",
    b"aside",
    b"center",
    b"ul",
    b"h4",
    b"img/",
    b"form",
)


@pytest.mark.parametrize(
    ("http", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\n" + HTML + b"\r\n" + PAGE, ""),
        (b"HTTP/1.1 200 OK\nContent-Type: text/html\n\n" + PAGE, ""),
        (b"HTTP/1.1 200 OK\r\nContent-Type:\r\n  text/html;\r\n\tcharset=utf-8\r\n\r\n" + PAGE, ""),
        (b"HTTP/2 203\r\n" + HTML + b"\r\n" + PAGE, ""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n" + HTML + b"\r\n" + PAGE, ""),
        (b"HTTP/1.1 206 Partial\r\n" + HTML + b"Content-Range: bytes 0-1149/1150\r\n\r\n" + PAGE, ""),
        (b"HTTP/1.1 206 Partial\r\n" + HTML + b"Content-Range: bytes 0-1149/2000\r\n\r\n" + PAGE, "http_error"),
        (b"HTTP/1.1 206 Partial\r\n" + HTML + b"\r\n" + PAGE, "http_error"),
        (b"HTTP/1.1 202 Accepted\r\n" + HTML + b"\r\n" + PAGE, "http_error"),
        (b"HTTP/1.1 503 Busy\n" + HTML + b"\n" + PAGE, "http_error"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Type: TEXT/HTML\r\n\r\n" + PAGE, ""),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/html charset=utf-8\r\n\r\n" + PAGE, ""),
        (b"HTTP/1.1 200 OK\r\n" + HTML, "empty"),
        # The type is missing or unknown.
        (b"HTTP/1.1 200 OK\r\n\r\n" + PAGE, ""),
        (b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n \n<!doctype HTML>" + PAGE, ""),
        (b"HTTP/1.1 200 OK\r\nContent-Type: \r\n\r\n<!-- a page --><HTML>" + PAGE, ""),
        (b"HTTP/1.1 200 OK\r\nContent-Type: unknown/unknown\r\n\r\n\xef\xbb\xbf<html>" + PAGE, ""),
        (b"HTTP/1.1 200 OK\r\n\r\n<?xml version='1.0'?>\n<!DOCTYPE html>" + PAGE, ""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks(*PARTS), ""),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + zipped(PAGE), ""),
        (b"HTTP/1.1 200 OK\r\n\r\n" + PAGE.decode().join(["\ufeff<html>", ""]).encode("utf-16-le"), ""),
        (PAGE, ""),  # the archive did not keep the headers
        *((b"HTTP/1.1 200 OK\r\n\r\n\n<" + tag + b">" + PAGE, "") for tag in OPENING),
        (b"HTTP/1.1 200 OK\r\n\r\nWarning: no such file in x.php\n <!DOCTYPE html><html>" + PAGE, ""),
        (b"HTTP/1.1 200 OK\r\n\r\nvar page = '\\\n<html>';", "not_html"),
        (b"HTTP/1.1 200 OK\r\n\r\nHow to write <html> and\n`<html>` pages", "not_html"),
        (b"HTTP/1.1 200 OK\r\n\r\n<svg xmlns='x'><a></a></svg>", "not_html"),
        (b"HTTP/1.1 200 OK\r\n\r\n<feed><title>x</title></feed>", "not_html"),
        (b"HTTP/1.1 200 OK\r\n\r\n<?xml version='1.0'?><rss></rss>", "not_html"),
        (b"HTTP/1.1 200 OK\r\n\r\n<paragraph> is no tag", "not_html"),
        (b"HTTP/1.1 200 OK\r\n\r\n%PDF-1.4 <html>", "not_html"),
        (b"HTTP/1.1 200 OK\r\n\r\n{}", "not_html"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + PAGE, "not_html"),
    ],
    ids=range(43),
)
def test_which_responses_are_pages(tmp_path: Path, http: bytes, reason: str) -> None:
    for content in (stored(http), zipped(stored(http))):
        (record,) = read(tmp_path / "a.warc", content, "warc")
        assert record.reason == reason
        if not reason:
            assert record.html and record.text.endswith(PAGE.decode()) and "HTTP" not in record.text


def test_pages_of_other_records(tmp_path: Path) -> None:
    identified = "WARC-Identified-Payload-Type: text/html\r\n"
    content = [
        stored(PAGE, "text/html", of="resource"),
        stored(PAGE, "image/png", of="resource"),
        stored(b"<x>" + PAGE, "", identified, of="resource"),
        stored(b"HTTP/1.1 200 OK\r\n\r\n<x>" + PAGE, more=identified),
        stored(b"HTTP/1.1 200 OK is what it says", "text/plain", of="conversion"),
    ]
    records = read(tmp_path / "a.warc", b"".join(content), "warc")
    assert reasons(records) == ["", "not_html", "", "", ""]
    assert [record.html for record in records] == [True, False, True, True, False]
    assert records[-1].text == "HTTP/1.1 200 OK is what it says"


def test_brotli_of_every_size_comes_out_whole() -> None:
    """Decodes Brotli of sizes around the decoder's block sizes, both of its input and of its output."""
    for size in (0, 1, 4_095, 4_096, 65_535, 65_536, 65_537, 1_000_000):
        for content in (os.urandom(size), b"".join(b"%d " % (number * number) for number in range(size // 6))):
            headers = {"Content-Encoding": "br"}
            assert decode_body(brotli.compress(content, quality=3), response(headers), ExtractConfig()) == content


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
