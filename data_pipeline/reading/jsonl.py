"""JSON lines, plain or compressed: one record a line, however long the lines are.

A line above `extract.max_record_bytes` is skipped over without being held. Blank lines are no records. Files that hold
one JSON array are left out: their one line is set aside as not_an_object.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from configs.data import ExtractConfig, SourceConfig
from data_pipeline.reading.decompression import Fault, claimed_compression, members
from data_pipeline.reading.records import SAMPLE_BYTES, Advance, FoundFile, Record, sample


@dataclass
class Line:
    """`number` is from 1, `offset` in bytes of content, `size` without the line end; one too long is only begun."""

    number: int
    offset: int
    size: int
    content: bytes
    too_long: bool


class LineSplitter:
    """Cuts blocks into lines, holding no more than `limit` bytes of one."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0
        self._held = 0
        self._number = 1
        self._offset = 0

    def feed(self, block: bytes) -> Iterator[Line]:
        *ends, rest = block.split(b"\n")
        for end in ends:
            self._add(end)
            yield self._line()
        self._add(rest)

    def close(self) -> Line:
        """What came after the last line end; empty where there was nothing."""
        return self._line()

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self._limit:
            self._parts.append(part)
        elif self._held <= self._limit:  # just now: keep the beginning
            self._parts = [b"".join([*self._parts, part])[:SAMPLE_BYTES]]
        self._held = self._size

    def _line(self) -> Line:
        line = Line(self._number, self._offset, self._size, b"".join(self._parts), self._size > self._limit)
        self._number += 1
        self._offset += self._size + 1
        self._parts, self._size, self._held = [], 0, 0
        return line


def read_jsonl(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    """One record a line; a stretch that cannot be decompressed is one record, and ends the line it begins in."""
    splitter = LineSplitter(limits.max_record_bytes)
    for item in members(content, limits, advance, claimed_compression(file.path)):
        if isinstance(item, Fault):
            line = splitter.close()
            yield Record(line.number, line.size, sample(line.content), reason=item.reason, offset=line.offset)
            continue
        for block in item.blocks():
            for line in splitter.feed(block):
                yield from _records(line, source)
    yield from _records(splitter.close(), source)


def _records(line: Line, source: SourceConfig) -> Iterator[Record]:
    if line.too_long:
        yield Record(line.number, line.size, sample(line.content), reason="record_too_large", offset=line.offset)
    elif line.content.strip():
        yield _record(line, source)


def _record(line: Line, source: SourceConfig) -> Record:
    record = Record(line.number, line.size, offset=line.offset)
    try:
        line.content.decode("utf-8")
        fields = orjson.loads(line.content)
    except UnicodeDecodeError:
        record.reason = "invalid_utf8"
    except orjson.JSONDecodeError:
        record.reason = "nul_bytes" if b"\0" in line.content else "bad_json"
    else:
        if isinstance(fields, dict):
            fill(record, fields, source)
        else:
            record.reason = "not_an_object"
    if record.reason:
        record.text = sample(line.content)
    return record


def fill(record: Record, fields: dict[str, Any], source: SourceConfig) -> None:
    """Text, id, URL and metadata of a record from its fields, or the reason why there is no text."""
    text, name, url = fields.get(source.text_key), fields.get(source.id_key), fields.get(source.url_key)
    if text is None:
        record.reason = "missing_text"
    elif not isinstance(text, str):
        record.reason = "text_not_a_string"
    elif not text.strip():
        record.reason = "empty"
    else:
        record.text = text
        if isinstance(fields.get("metadata"), dict):
            record.metadata["record"] = fields["metadata"]
        if isinstance(url, str):
            record.metadata["url"] = url
    if isinstance(name, str | int):
        record.id = str(name)
