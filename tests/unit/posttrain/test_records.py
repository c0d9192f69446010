"""Files of post-training records: compressions, encodings, and what is no file of JSON lines."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from configs.loader import ConfigError
from posttrain.records import Unusable, read_records

RECORDS = [{"prompt": f"How much is {number}?", "answer": "é 😀 “much”"} for number in range(30)]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
PLAIN = LINES.encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(PLAIN)),
        ("a.jsonl.gz", gzip.compress(PLAIN[:100]) + gzip.compress(PLAIN[100:]) + bytes(512)),
        ("gzip_by_its_bytes.jsonl", gzip.compress(PLAIN)),
        ("a.jsonl", LINES.encode("utf-16")),
        ("a.jsonl", LINES.encode("utf-16-be")),
        ("a.jsonl", LINES.encode("utf-32-le")),
        ("a.jsonl", LINES.encode("utf-8-sig")),
        ("a.jsonl", LINES.replace("\n", "\r\n").encode()),
        ("a.jsonl.gz", gzip.compress(PLAIN + b" " * 10_000_000 + b"\n")),
    ],
)
def test_records_are_read_in_each_compression_and_encoding(tmp_path: Path, name: str, content: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    found = list(read_records([str(file)], "data.pairs"))
    assert [record for _, record in found] == RECORDS
    assert [where for where, _ in found] == [f"{file}:{number}" for number in range(1, 31)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl.bz2", bz2.compress(PLAIN), "it is compressed with bzip2, which is not read; compress it with gzip"),
        ("a.jsonl", b"PK\x03\x04", r"it is an archive \(zip\), which is not read; unpack it"),
        ("a.jsonl", lzma.compress(PLAIN), "it is compressed with xz, which is not read; compress it with gzip"),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(PLAIN)[:-9], "cut zstd at byte 0"),
        ("a.jsonl.gz", PLAIN, "corrupt gzip at byte 0"),
    ],
)
def test_a_file_that_cannot_be_read_whole_is_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name} in data\.pairs cannot be read to its end \({said}.*\); restore it"):
        list(read_records([str(tmp_path / name)], "data.pairs"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(RECORDS), "the line is a list; give each of its items a line"),
        (json.dumps(RECORDS, indent=1), "it goes on in the next line; write it on one line"),
        (json.dumps(RECORDS[0], indent=1), "it goes on in the next line; write it on one line"),
    ],
)
def test_json_that_is_no_record_on_a_line_says_what_a_line_should_be(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    _, first = next(read_records([str(file)], "data.pairs"))
    assert isinstance(first, Unusable) and first.details == said
