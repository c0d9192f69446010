"""Reader of JSON lines, plain or compressed: one record per line, in memory bounded whatever the lines' length.

A line above `extract.max_record_bytes` is skipped without being held in memory. Blank lines and a byte order mark at
the start of a line are ignored. NaN, infinities and lone surrogates, which JSON forbids but Python's json writes, are
read and counted. A file that is one JSON array is not supported: it is set aside as not_an_object.
"""

import codecs
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.decompression import Fault, claimed_compression, members
from data_pipeline.reading.fields import NOT_FINITE, fill, plain
from data_pipeline.reading.records import SAMPLE_BYTES, Advance, FoundFile, Record, sample


@dataclass
class Line:
    """A line of a file: its number (from 1), byte offset in the decompressed content, size without line end, content.

    If `too_long`, `content` is only the beginning of the line.
    """

    number: int
    offset: int
    size: int
    content: bytes
    too_long: bool


class LineSplitter:
    """Splits blocks of bytes into lines; holds at most about `limit` bytes of a line."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0
        self._held = 0
        self._number = 1
        self._offset = 0

    def feed(self, block: bytes) -> Iterator[Line]:
        """Yields the lines that the next block completes."""
        *ends, rest = block.split(b"\n")
        for end in ends:
            self._add(end)
            yield self._line()
        self._add(rest)

    def close(self) -> Line:
        """Returns what came after the last line end as a line, which may be empty."""
        return self._line()

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self._limit:
            self._parts.append(part)
        elif self._held <= self._limit:  # the line has just become too long: keep its beginning
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
    """Yields one record per line; a part that cannot be decompressed is one record and ends the line it begins in."""
    splitter = LineSplitter(limits.max_record_bytes)
    for item in members(content, limits, advance, claimed_compression(file.path)):
        if isinstance(item, Fault):
            line = splitter.close()
            yield Record(line.number, line.size, sample(line.content), reason=item.reason, offset=line.offset)
            continue
        for block in item.blocks():
            for line in splitter.feed(block):
                yield from _records(line, source, limits)
    yield from _records(splitter.close(), source, limits)


def _records(line: Line, source: SourceConfig, limits: ExtractConfig) -> Iterator[Record]:
    content = line.content.removeprefix(codecs.BOM_UTF8)
    if line.too_long:
        yield Record(line.number, line.size, sample(content), reason="record_too_large", offset=line.offset)
    elif content.strip():
        yield _record(line, content, source, limits)


def _record(line: Line, content: bytes, source: SourceConfig, limits: ExtractConfig) -> Record:
    """Makes a record of a line that is neither blank nor too long."""
    record = Record(line.number, line.size, offset=line.offset)
    try:
        fields = parse(content, record.notes)
    except UnicodeDecodeError:
        record.reason = "invalid_utf8"
    except (ValueError, RecursionError):
        record.reason = "nul_bytes" if b"\0" in content else "bad_json"
    else:
        if isinstance(fields, dict):
            fill(record, fields, source, limits)
        else:
            record.reason = "not_an_object"
    if record.reason:
        record.text = sample(content)
    return record


def parse(content: bytes, notes: set[str]) -> Any:
    """Parses a JSON text, repairs NaN, infinities and lone surrogates, and adds each kind of repair to `notes`.

    Raises UnicodeDecodeError if it is not UTF-8, and ValueError or RecursionError if it is not JSON or too deep.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        try:
            text = content.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise error from None
    else:
        with contextlib.suppress(orjson.JSONDecodeError):
            value = orjson.loads(content)
            if not (isinstance(value, dict) and any(map(_may_be_rounded, value.values()))):
                return value

    def constant(name: str) -> float:
        notes.add(NOT_FINITE)
        return float(name)

    return plain(json.loads(text, parse_constant=constant), notes)


def _may_be_rounded(value: Any) -> bool:
    """Whether `value` may stand for an integer beyond 64 bits, which orjson rounds to a float."""
    return isinstance(value, float) and abs(value) >= 1 << 63
