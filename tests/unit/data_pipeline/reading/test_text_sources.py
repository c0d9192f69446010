"""Tests text files in an encoding set in the config, with one document per file or line, intact or damaged."""

import gzip
from pathlib import Path

import pytest
import zstandard

from configs.loader import ConfigError
from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.input_records import Record
from data_pipeline.reading.source_reader import find_units, read_file
from tests.unit.data_pipeline.reading.encodings import ENCODED, JAPANESE, RUSSIAN, encoded

LINES = ["first", "", "  ", "fourth\r", "\tfifth "]
WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32")


def read(path: Path, content: bytes, limits: ExtractConfig | None = None, **options: str) -> list[Record]:
    path.write_bytes(content)
    options = {"format": "text"} | options
    source = SourceConfig.model_validate({"files": (str(path),), "rules": {"any": "r"}} | options)
    advanced = list[int]()
    records = [
        record
        for unit in find_units("s", source, 1000)
        for file in unit.files
        for record in read_file(file, source, limits or ExtractConfig(), advanced.append)
    ]
    assert sum(advanced) == len(content)
    return records


def found(records: list[Record]) -> list[tuple[int, str, str]]:
    return [(record.position, record.text if not record.reason else "", record.reason) for record in records]


def test_a_source_names_the_encoding_of_its_text(tmp_path: Path) -> None:
    for label, codec, text in ENCODED:
        content = encoded(f"{text}\n\n{text}", codec)
        (record,) = read(tmp_path / "a.txt", content, encoding=label)
        assert (record.text, record.reason) == (f"{text}\n\n{text}", ""), label
        lines = read(tmp_path / "a.txt.gz", gzip.compress(content), encoding=label, document_per="line")
        assert found(lines) == [(1, text, ""), (3, text, "")], label
    (record,) = read(tmp_path / "a.py", f"# {RUSSIAN}".encode("koi8-r"), format="code", encoding="koi8-r")
    assert record.text == f"# {RUSSIAN}"


@pytest.mark.parametrize("per", ["file", "line"])
def test_utf_8_in_a_source_of_another_encoding_is_decoded_as_such_and_counted(tmp_path: Path, per: str) -> None:
    for encoding in ("koi8-r", "gb18030", "shift_jis", "iso-8859-5"):
        (record,) = read(tmp_path / "a.txt", RUSSIAN.encode(), encoding=encoding, document_per=per)
        assert (record.text, record.notes) == (RUSSIAN, {"UTF-8 in place of the source's encoding"})
    (record,) = read(tmp_path / "a.txt", "联通".encode("gb18030"), encoding="gb18030", document_per=per)
    assert (record.text, record.notes) == ("联通", set())  # so few bytes are valid UTF-8 by chance


@pytest.mark.parametrize("per", ["file", "line"])
def test_a_byte_order_mark_counts_more_than_what_the_source_says(tmp_path: Path, per: str) -> None:
    for codec in ("utf-8-sig", "utf-16", "utf-32"):
        for encoding in ("utf-8", "windows-1251", "utf-16be"):
            content = RUSSIAN.encode(codec)
            assert found(read(tmp_path / "a", content, encoding=encoding, document_per=per)) == [(1, RUSSIAN, "")]
    content = RUSSIAN.encode("utf-16-be")
    assert found(read(tmp_path / "a", content, encoding="utf-16be", document_per=per)) == [(1, RUSSIAN, "")]


@pytest.mark.parametrize(
    ("content", "encoding", "reason", "offset"),
    [
        (b"words \xff words", "utf-8", "invalid_utf8", 6),
        ("a word".encode("utf-16")[:-1], "utf-8", "invalid_utf16", 12),
        ("a word".encode("utf-16-be") + b"\xdc\x00", "utf-16be", "invalid_utf16", 12),
        ("a word".encode("utf-32")[:-1], "utf-8", "invalid_utf32", 24),
        (b"\xb0\xa1 \xb0", "euc-kr", "undecodable", 3),
        (b"caf\xe9 \x81", "windows-1252", "undecodable", 5),
        (JAPANESE[:3].encode("cp932") + b"\xff", "shift_jis", "undecodable", 6),
        ("a word".encode("utf-16-le"), "utf-8", "nul_bytes", 1),
    ],
)
def test_text_that_is_not_what_it_should_be(
    tmp_path: Path, content: bytes, encoding: str, reason: str, offset: int
) -> None:
    (record,) = read(tmp_path / "a.txt", content, encoding=encoding)
    assert (record.reason, record.offset) == (reason, offset)
    (record,) = read(tmp_path / "a.txt", content, encoding=encoding, document_per="line")
    assert (record.reason, record.offset) == (reason, offset)


def test_lines_are_documents(tmp_path: Path) -> None:
    expected = [(1, "first", ""), (4, "fourth", ""), (5, "\tfifth ", "")]
    for codec in ("utf-8", "utf-8-sig", *WIDE):
        for end in ("", "\n", "\n\n"):
            content = ("\n".join(LINES) + end).encode(codec)
            for packed in (content, gzip.compress(content), zstandard.compress(content)):
                records = read(tmp_path / "a.txt", packed, encoding=codec.removesuffix("-sig"), document_per="line")
                assert found(records) == expected, (codec, end)
    for nothing in (b"\n \n\n", b"\xef\xbb\xbf", b"\xff\xfe"):
        assert read(tmp_path / "a.txt", nothing, document_per="line") == []


def test_a_bad_line_costs_itself_alone(tmp_path: Path) -> None:
    limits = ExtractConfig(max_record_bytes=1000)
    content = b"one\n\xff\n" + b"x" * 1001 + b"\nfour\nfi\0ve\nsix"
    reasons = {2: "invalid_utf8", 3: "record_too_large", 5: "nul_bytes"}
    records = read(tmp_path / "a.txt", content, limits, document_per="line")
    assert {record.position: record.reason for record in records if record.reason} == reasons
    assert [record.text for record in records if not record.reason] == ["one", "four", "six"]
    assert records[1].offset == 4
    wide = "one\n?\nthree".encode("utf-16-le").replace(b"?\0", b"\x00\xdc")
    lines = read(tmp_path / "a.txt", wide, encoding="utf-16", document_per="line")
    assert found(lines) == [(1, "one", ""), (2, "", "invalid_utf16"), (3, "three", "")]
    text = "Ä\n\U0001f600 two\nb\0\nlast"
    for codec in WIDE:
        wide = text.encode(codec)
        ends = [len(text[: text.index(part)].encode(codec)) for part in ("\U0001f600", "\0", "last")]
        lines = read(tmp_path / "a.txt", wide, encoding=codec, document_per="line")
        assert [line.offset for line in lines] == [0, *ends], codec  # bytes of the file, not of UTF-8
    packed = gzip.compress(b"one\ntwo\n" * 9) + gzip.compress(b"three\n" * 99)[:20]
    cut = read(tmp_path / "a.txt", packed, document_per="line")
    reasons_of_cut = [record.reason for record in cut]
    assert len(cut) > 18 and reasons_of_cut == [""] * (len(cut) - 1) + ["cut_gzip"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "windows-1251", "format": "jsonl"}, "encoding = 'windows-1251' is for the formats 'text'"),
        ({"document_per": "line", "format": "html"}, "document_per = 'line' is for format 'text', not 'html'"),
        ({"encoding": "klingon"}, "sources.s.encoding = 'klingon' is not a known encoding"),
    ],
)
def test_keys_that_do_not_fit(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        read(tmp_path / "a", b"text", **options)
