"""Reader of JSON lines, plain or compressed: one record per line, in memory bounded whatever the lines' length.

Files are UTF-8, or UTF-16 or UTF-32 with or without a byte order mark. A line above `extract.max_record_bytes` is
skipped without being held in memory. Blank lines and a byte order mark at the start of a line are ignored. NaN,
infinities and lone surrogates, which JSON forbids but Python's json writes, are read and counted. A file that is one
JSON array is not supported: it is set aside as not_an_object.
"""

import codecs
import contextlib
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson

from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.charsets import wide_charset
from data_pipeline.reading.decompression import Fault, claimed_compression, members
from data_pipeline.reading.fields import NOT_FINITE, fill, plain
from data_pipeline.reading.input_records import Advance, FoundFile, Record, sample
from data_pipeline.reading.line_splitter import Line, LineSplitter


def read_jsonl(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    """Yields one record per line; a part that cannot be decompressed is one record and ends the line it begins in."""
    splitter = LineSplitter(limits.max_record_bytes, recognize=wide_charset)
    for item in members(content, limits, advance, claimed_compression(file.path)):
        if isinstance(item, Fault):
            line = splitter.break_off()
            yield Record(line.number, line.size, sample(line.content), reason=item.reason, offset=line.offset)
            continue
        for block in item.blocks():
            for line in splitter.feed(block):
                yield from _records(line, source, limits)
    for line in splitter.close():
        yield from _records(line, source, limits)


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
            if not _may_be_rounded(value):
                return value

    def constant(name: str) -> float:
        notes.add(NOT_FINITE)
        return float(name)

    return plain(json.loads(text, parse_constant=constant), notes)


def _may_be_rounded(value: Any) -> bool:
    """Tells whether `value` may hold an integer beyond 64 bits, which orjson rounds to a float."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, float) and abs(one) >= 1 << 63:
            return True
    return False
