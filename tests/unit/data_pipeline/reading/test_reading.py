"""Tests broken input files: every sound record is read, and every broken one is reported once, with the reason."""

import gzip
import json
from pathlib import Path

import pytest

from tests.unit.data_pipeline.reading.raw_files import PAGE, read, reasons, warc


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "bad_json"),
        (b'["a list"]', "not_an_object"),
        (b'{"id": "x"}', "missing_text"),
        (b'{"text": null}', "missing_text"),
        (b'{"text": 5}', "text_not_a_string"),
        (b'{"text": "  \\n"}', "empty"),
        (b'{"text": "\xff\xfe"}', "invalid_utf8"),
    ],
)
def test_a_broken_line_is_marked_and_the_next_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    records = read(tmp_path / "a.jsonl", b'{"text": "one", "id": "1"}\n' + line + b'\n\n{"text": "three"}')
    assert reasons(records) == ["", reason, ""]
    assert [record.position for record in records] == [1, 2, 4]
    assert [record.text for record in records][::2] == ["one", "three"]
    assert [record.offset for record in records] == [0, 27, 29 + len(line)]
    assert records[1].size == len(line)


def test_a_cut_gzip_keeps_the_lines_before_the_cut(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {n} " + "x" * (n * 7919 % 400), "id": str(n)}) for n in range(2000)]
    content = gzip.compress("\n".join(lines).encode(), mtime=0)
    records = read(tmp_path / "a.jsonl.gz", content[: len(content) // 2])
    assert reasons(records)[-1] == "cut_gzip"
    assert set(reasons(records)[:-1]) == {""}
    assert 500 < len(records) < 1500
    assert records[-1].position == len(records)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl.gz", b"this is no gzip file", "corrupt_gzip"),
        ("a.jsonl.zst", b"this is no Zstandard file", "corrupt_zstd"),
        ("a.jsonl.gz", b"", "empty_file"),
        ("a.jsonl", b"", "empty_file"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    assert reasons(read(tmp_path / name, content)) == [reason]


def test_warc_pages_are_decoded_by_their_own_encoding(tmp_path: Path) -> None:
    page = "<html><head><meta charset='gb18030'></head><body>话说天下大势</body></html>".encode("gb18030")
    (record,) = read(tmp_path / "a.warc.gz", b"".join(warc([page], kind="text/html")), "warc")
    assert "话说天下大势" in record.text
    assert record.html
    assert record.metadata["url"] == "http://example.org/0"


def test_reading_goes_on_after_a_member_that_swallows_the_rest(tmp_path: Path) -> None:
    """Reads a file with a stored block that claims 65,535 bytes, and so takes in all members after it."""
    members = warc([PAGE.format(n).encode() for n in range(5)])
    members[2] = members[2][:10] + b"\x00\xff\xff\x00\x00" + members[2][15:]
    assert len(b"".join(members[2:])) < 65535
    records = read(tmp_path / "a.warc.gz", b"".join(members), "warc")
    assert reasons(records) == ["", "", "corrupt_gzip", "", ""]


def test_reading_goes_on_after_a_corrupt_member(tmp_path: Path) -> None:
    members = warc([PAGE.format(n).encode() for n in range(5)])
    broken = bytearray(members[2])
    broken[len(broken) // 2 :] = b"\0" * (len(broken) - len(broken) // 2)
    content = b"".join([*members[:2], bytes(broken), *members[3:]])
    records = read(tmp_path / "a.warc.gz", content, "warc")
    assert reasons(records) == ["", "", "corrupt_gzip", "", ""]
    assert records[2].position == len(members[0]) + len(members[1])
    assert records[2].size == len(broken)


def test_a_corrupt_member_that_still_decompresses_to_a_part_of_a_record_is_reported_once(tmp_path: Path) -> None:
    members = warc([PAGE.format(n).encode() for n in range(3)])
    broken = bytearray(gzip.compress(b"WARC/1.0\r\nWARC-Type: response\r\n\r\nno record\r\n" * 9000, mtime=0))
    broken[-8] ^= 1  # of the checksum
    content = b"".join([members[0], bytes(broken), *members[1:]])
    assert reasons(read(tmp_path / "a.warc.gz", content, "warc")) == ["", "corrupt_gzip", "", ""]


@pytest.mark.parametrize("left", [1, 5, 40, 200])
def test_a_cut_warc_reports_its_last_record(tmp_path: Path, left: int) -> None:
    members = warc([PAGE.format(n).encode() for n in range(3)])
    records = read(tmp_path / "a.warc.gz", members[0] + members[1] + members[2][:left], "warc")
    assert reasons(records)[:2] == ["", ""]
    assert reasons(records)[2:] in (["cut_gzip"], ["corrupt_gzip"])  # a single byte is not recognized as gzip


def test_a_cut_plain_warc_reports_its_last_record(tmp_path: Path) -> None:
    content = gzip.decompress(b"".join(warc([PAGE.format(n).encode() for n in range(3)])))
    assert reasons(read(tmp_path / "a.warc", content[:-40], "warc")) == ["", "", "cut_record"]


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [("404 Not Found", "text/html", "http_error"), ("200 OK", "image/png", "not_html")],
)
def test_sound_records_without_a_page(tmp_path: Path, status: str, kind: str, reason: str) -> None:
    content = b"".join(warc([b"something"], status=status, kind=kind))
    assert reasons(read(tmp_path / "a.warc.gz", content, "warc")) == [reason]


@pytest.mark.parametrize("content", [b"", b"garbage" * 50, gzip.compress(b"garbage" * 50, mtime=0)])
def test_a_file_that_is_no_warc(tmp_path: Path, content: bytes) -> None:
    records = read(tmp_path / "a.warc.gz", content, "warc")
    assert len(records) == 1
    assert records[0].reason in ("bad_warc", "corrupt_gzip", "empty_file")
