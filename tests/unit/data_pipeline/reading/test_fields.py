"""Tests fields beside the text: they are kept, converted where JSON has no such value, and limited in size."""

import datetime
import decimal
import gzip
import json
import math
import uuid
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from configs.loader import ConfigError
from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.fields import LEFT_OUT, NOT_FINITE, SURROGATES
from data_pipeline.reading.input_records import FoundFile, Record
from data_pipeline.reading.keys import check_keys
from data_pipeline.reading.source_reader import find_units, read_file

LIMITS = ExtractConfig()


def read(path: Path, limits: ExtractConfig = LIMITS, **keys: Any) -> list[Record]:
    kind = "parquet" if path.suffix == ".parquet" else "jsonl"
    source = SourceConfig(files=("-",), format=kind, rules={"any": "r"}, **keys)
    records = list(read_file(FoundFile(str(path), path.stat().st_size), source, limits, lambda size: None))
    for record in records:  # all values can be written as JSON
        orjson.dumps({"text": record.text, "id": record.id, "metadata": {"all": record.metadata}})
    return records


def lines(path: Path, *records: dict[str, Any] | bytes) -> Path:
    path.write_bytes(b"\n".join(one if isinstance(one, bytes) else json.dumps(one).encode() for one in records))
    return path


def table(path: Path, rows: int = 3, **columns: Any) -> Path:
    pq.write_table(pa.table({"text": [f"text {number}" for number in range(rows)]} | columns), path)
    return path


def test_other_fields_are_carried_all_or_by_a_list(tmp_path: Path) -> None:
    record = {"id": 7, "text": "x", "url": "http://a.org", "license": "CC-BY-4.0", "source": "wiki", "position": 9}
    record |= {"metadata": {"license": "MIT"}, "nested": {"dump": "2024-10", "n": [1, 2]}, "nothing": None}
    for path in (lines(tmp_path / "a.jsonl", record), tmp_path / "a.parquet"):
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([record]), path)
        (one,) = read(path)
        others = {name: record[name] for name in ("license", "source", "position", "nested")}
        # The two licences do not overwrite each other, nor do `source` and `position` overwrite the pipeline's own.
        assert one.metadata == {"url": "http://a.org", "record": {"license": "MIT"}, "fields": others}
        assert (one.id, one.text, one.notes) == ("7", "x", set())
        (one,) = read(path, fields=("license", "nested.dump", "none"), metadata_key="nested")
        assert one.metadata["fields"] == {"license": "CC-BY-4.0", "nested.dump": "2024-10"}
        assert one.metadata["record"] == record["nested"]
        (one,) = read(path, fields=())
        assert set(one.metadata) == {"url", "record"}
    (one,) = read(lines(tmp_path / "b.jsonl", {"text": "x", "id": ["a"], "url": 5, "metadata": "m"}))
    assert one.metadata == {"fields": {"id": ["a"], "url": 5, "metadata": "m"}} and one.id == ""


def test_what_is_carried_is_bounded(tmp_path: Path) -> None:
    deep = b'{"text": "x", "small": 1, "deep": ' + b"[" * 400 + b"]" * 400 + b', "metadata": {"a": ' + b"[" * 400
    for path in (
        lines(tmp_path / "a.jsonl", {"text": "x", "html": "y" * 20_000, "small": 1}, deep + b"]" * 400 + b"}}"),
        table(tmp_path / "a.parquet", 2, html=["y" * 20_000, "z" * 30_000], small=[1, 1]),
    ):
        for one in read(path):
            assert (one.text[0], one.metadata, one.notes) == (one.text[0], {"fields": {"small": 1}}, {LEFT_OUT})
            assert not one.reason


def test_a_damaged_column_that_is_only_carried_costs_no_text(tmp_path: Path) -> None:
    path = table(tmp_path / "a.parquet", 1500, other=[f"value {number}" for number in range(1500)])
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    start, size = column.dictionary_page_offset, column.total_compressed_size
    content = bytearray(path.read_bytes())
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
    records = read(path)
    assert [one.text for one in records] == [f"text {number}" for number in range(1500)]
    assert all(one.notes == {LEFT_OUT} and not one.reason for one in records)


def columns() -> dict[str, tuple[pa.Array, Any]]:
    """Maps each type that JSON lacks to (a column, the JSON value that its first row becomes)."""
    one = uuid.UUID(int=7)
    return {
        "bytes": (pa.array([b"\xff\x00", None, b"b"]), "ff00"),
        "words": (pa.array([b"words", None, b"b"], pa.large_binary()), "words"),
        "decimal": (pa.array([decimal.Decimal("1.50"), None, None]), "1.50"),
        "wide": (pa.array([decimal.Decimal("1.50"), None, None], pa.decimal256(60, 2)), "1.50"),
        "nanoseconds": (pa.array([1, 2, None], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
        "zone": (pa.array([1, 2, None], pa.timestamp("us", "UTC")), "1970-01-01 00:00:00.000001Z"),
        "date": (pa.array([datetime.date(2024, 2, 29), None, None]), "2024-02-29"),
        "far": (pa.array([2**30, None, None], pa.date32()), str(2**30)),
        "time": (pa.array([1, 2, None], pa.time64("ns")), "00:00:00.000000001"),
        "duration": (pa.array([5, 2, None], pa.duration("ms")), "5 ms"),
        "nan": (pa.array([math.nan, math.inf, -math.inf]), "NaN"),
        "half": (pa.array([1.5, None, 2.0]).cast(pa.float16()), 1.5),
        "unsigned": (pa.array([2**64 - 1, 1, 2], pa.uint64()), 2**64 - 1),
        "bool": (pa.array([True, None, False]), True),
        "list": (pa.array([[b"\xff", None], None, []]), ["ff", None]),
        "struct": (pa.array([{"a": {"b": decimal.Decimal("2.5")}}, None, None]), {"a": {"b": "2.5"}}),
        "map": (pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int32())), {"k": 1}),
        "twice": (pa.array([[("k", 1), ("k", 2)], None, []], pa.map_(pa.string(), pa.int32())), [["k", 1], ["k", 2]]),
        "nowhere": (pa.array([1, 2, None], pa.timestamp("us", "Nowhere/Town")), "1 us"),
        "beyond": (pa.array([2**62, 2, None], pa.timestamp("ms")), f"{2**62} ms"),
        "numbered": (pa.array([[(1, 2)], None, []], pa.map_(pa.int32(), pa.int32())), [[1, 2]]),
        "uuid": (pa.array([one.bytes] * 3, pa.uuid()), str(one)),
        "dictionary": (pa.array(["a", "b", None]).dictionary_encode(), "a"),
        "view": (pa.array(["v", None, "w"], pa.string_view()), "v"),
        "broken": (pa.array([b"caf\xe9", None, b"b"]).view(pa.binary()).cast(pa.string(), safe=False), "caf\ufffd"),
    }


def test_values_of_every_type_are_carried(tmp_path: Path) -> None:
    made = columns()
    path = table(tmp_path / "a.parquet", **{name: column for name, (column, _) in made.items()}, none=pa.nulls(3))
    records = read(path)
    assert [one.reason for one in records] == [""] * 3
    assert records[0].metadata["fields"] == {name: value for name, (_, value) in made.items()}
    # The same values inside a metadata column of any name.
    inner = pa.StructArray.from_arrays([column for column, _ in made.values()], names=list(made))
    path = table(tmp_path / "b.parquet", info=inner)
    records = read(path, metadata_key="info")
    assert records[0].metadata == {"record": {name: value for name, (_, value) in made.items()}}


@pytest.mark.parametrize("kind", ["large_string", "string_view", "binary", "large_binary", "binary_view", "dictionary"])
def test_text_and_ids_of_every_type(tmp_path: Path, kind: str) -> None:
    texts = pa.array(["eins\x1b", None, "zwei", " "])
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(getattr(pa, kind)())
    numbers = pa.array([1, 2, None, 4])
    pq.write_table(pa.table({"t": texts, "id": numbers}), tmp_path / "a.parquet")
    records = read(tmp_path / "a.parquet", text_key="t")
    assert [(one.text, one.id, one.reason) for one in records] == [
        ("eins\x1b", "1", ""),
        ("", "2", "missing_text"),
        ("zwei", "", ""),
        ("", "4", "empty"),
    ]
    assert [one.id for one in read(tmp_path / "a.parquet", text_key="t", id_key="t")][:3:2] == ["eins\x1b", "zwei"]


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_strings_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    made = pa.table({"text": ["prefix one", None, "prefix two"], "id": ["1", "2", "3"], "a": ["x", "xy", None]})
    pq.write_table(
        made, tmp_path / "a.parquet", use_dictionary=False, column_encoding=dict.fromkeys(["a", "text", "id"], encoding)
    )
    assert [(one.text, one.id, one.reason) for one in read(tmp_path / "a.parquet")] == [
        ("prefix one", "1", ""),
        ("", "2", "missing_text"),
        ("prefix two", "3", ""),
    ]


def test_of_columns_with_one_name_the_first_counts_and_two_texts_are_an_error(tmp_path: Path) -> None:
    one, two = pa.array(["one"]), pa.array(["two"])
    pq.write_table(pa.Table.from_arrays([one, one, two], ["text", "a", "a"]), tmp_path / "a.parquet")
    assert [record.metadata for record in read(tmp_path / "a.parquet")] == [{"fields": {"a": "one"}}]
    pq.write_table(pa.Table.from_arrays([one, two], ["text", "text"]), tmp_path / "b.parquet")
    assert [(record.reason, record.text) for record in read(tmp_path / "b.parquet")] == [
        ("bad_parquet", "2 columns are named 'text'")
    ]


def test_no_rows_are_no_documents(tmp_path: Path) -> None:
    schema = pa.schema([("text", pa.string()), ("id", pa.int64())])
    pq.write_table(schema.empty_table(), tmp_path / "none.parquet")
    assert read(tmp_path / "none.parquet") == []
    with pq.ParquetWriter(tmp_path / "some.parquet", schema) as out:
        for rows in (0, 2, 0):
            out.write_table(pa.table({"text": ["a", "b"][:rows], "id": [1, 2][:rows]}, schema))
    assert [(one.position, one.text, one.reason) for one in read(tmp_path / "some.parquet")] == [
        (1, "a", ""),
        (2, "b", ""),
    ]


def test_keys_lead_into_nested_objects_unless_a_field_has_that_name(tmp_path: Path) -> None:
    nested = {"a": {"b": "text", "i": 3, "u": {"r.l": "http://x.org"}, "m": {"k": 1}, "rest": 1}, "c": 2}
    keys = {"text_key": "a.b", "id_key": "a.i", "url_key": "a.u.r.l", "metadata_key": "a.m"}
    pq.write_table(pa.Table.from_pylist([nested]), tmp_path / "a.parquet")
    for path in (lines(tmp_path / "a.jsonl", nested), tmp_path / "a.parquet"):
        (one,) = read(path, **keys)
        assert (one.text, one.id, one.metadata["url"]) == ("text", "3", "http://x.org")
        assert one.metadata["record"] == {"k": 1} and one.metadata["fields"]["a"]["rest"] == 1
        assert one.metadata["fields"]["c"] == 2
    literal = {"a.b": "literal", "a": {"b": "nested"}}
    (one,) = read(lines(tmp_path / "b.jsonl", literal), text_key="a.b")
    assert one.text == "literal"
    pq.write_table(pa.table({"a.b": ["literal"]}), tmp_path / "b.parquet")
    assert [one.text for one in read(tmp_path / "b.parquet", text_key="a.b")] == ["literal"]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_a_mark_before_a_line_is_none_of_it(tmp_path: Path, pack: Any) -> None:
    content = b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n\xef\xbb\xbf{"text": "three"}\n\xef\xbb\xbf'
    (tmp_path / "a.jsonl").write_bytes(pack(content))
    assert [(one.text, one.reason) for one in read(tmp_path / "a.jsonl")] == [("one", ""), ("two", ""), ("three", "")]


def test_what_json_forbids_and_writers_write_is_mended(tmp_path: Path) -> None:
    records = read(
        lines(
            tmp_path / "a.jsonl",
            b'{"text": "nan", "n": NaN, "i": [-Infinity]}',
            b'{"text": "half \\ud83d", "id": "\\udc00", "metadata": {"\\ud800": "\\ud83d\\ude00"}}',
            '{"text": "half \ud83d as bytes"}'.encode("utf-8", "surrogatepass"),
            b'{"text": "big", "id": 123456789012345678901234567890, "n": -9999999999999999999999}',
            b'{"text": "whole \\ud83d\\ude00"}',
            b'{"text": "nested", "metadata": {"a": [1, {"b": 123456789012345678901234567890}]}}',
            '{"text": "pair \ud83d\ude00 as bytes"}'.encode("utf-8", "surrogatepass"),
            b'{"text": "nan", "n": nan}',
            b'{"text": "lat\xe9"}',
            b"[" * 100_000,
        )
    )
    assert [one.reason for one in records] == ["", "", "", "", "", "", "", "bad_json", "invalid_utf8", "bad_json"]
    assert records[0].metadata["fields"] == {"n": "NaN", "i": ["-Infinity"]} and records[0].notes == {NOT_FINITE}
    assert (records[1].text, records[1].id) == ("half \ufffd", "\ufffd") and records[1].notes == {SURROGATES}
    assert records[1].metadata["record"] == {"\ufffd": "😀"}
    assert records[2].text == "half \ufffd as bytes"
    assert records[3].id == "123456789012345678901234567890"
    assert records[3].metadata["fields"] == {"n": "-9999999999999999999999"}
    assert records[4].text == "whole 😀" and not records[4].notes
    assert records[5].metadata == {"record": {"a": [1, {"b": "123456789012345678901234567890"}]}}
    assert records[6].text == "pair 😀 as bytes" and not records[6].notes  # nothing was replaced


def check(path: Path, **keys: Any) -> None:
    kind = "parquet" if path.suffix == ".parquet" else "jsonl"
    source = SourceConfig(files=(str(path),), format=kind, rules={"any": "r"}, **keys)
    check_keys(find_units("web", source, 1000), LIMITS)


def test_a_key_that_is_nowhere_is_one_sentence(tmp_path: Path) -> None:
    rows = [{"body": f"text {number}", "meta": {"uid": number, "tags": ["x"]}, "n": 1} for number in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (lines(tmp_path / "a.jsonl", b"{", *rows), tmp_path / "a.parquet"):
        for key, wrong, right in (
            ("text_key", "text", "body"),
            ("id_key", "uid", "meta.uid"),
            ("url_key", "link", "url"),
            ("metadata_key", "info", "meta"),
            ("fields", ("n", "licence"), ("n",)),
        ):
            with pytest.raises(ConfigError) as error:
                check(path, **{"text_key": "body", key: wrong})
            said = str(error.value)
            assert f"sources.web.{key} " in said and repr("licence" if key == "fields" else wrong) in said
            there = "objects there are meta" if key == "metadata_key" else "keys there are body, meta.uid, meta.tags, n"
            count = 1 if path.suffix == ".parquet" else 30  # a table says its columns at once
            ending = f" records in {path} has this key; the {there}; name the one "
            assert f", but none of the first {count}{ending}" in said
            check(path, **{"text_key": "body", key: right})  # the remedy in the message works
        for key, what in (("n", "numbers"), ("meta.tags", "lists")):
            with pytest.raises(
                ConfigError, match=f"text_key = '{key}' holds no text but {what} in .*; the keys there are"
            ):
                check(path, text_key=key)
    # A key of a single record is enough, and files that cannot be read raise no error here: their reader reports them.
    check(lines(tmp_path / "b.jsonl", *rows, {"body": "x", "rare": 1}), text_key="body", id_key="rare")
    check(lines(tmp_path / "c.jsonl", b"\x00\x01", b"not json"), text_key="body")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and no more")
    check(tmp_path / "d.parquet", text_key="body")
