"""Files that are one document each: plain text, HTML pages and source code, in folders of any depth.

The path is the document's id. Text is UTF-8, or UTF-16 with a byte order mark; a text file in any other encoding is set
aside, while pages say what theirs is. A source file with a NUL byte near its start is binary, as git has it.
"""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from configs.data import ExtractConfig, SourceConfig
from data_pipeline.reading.decompression import Fault, claimed_compression, members
from data_pipeline.reading.formats import language_of
from data_pipeline.reading.page_decoding import fill_page
from data_pipeline.reading.records import SAMPLE_BYTES, Advance, FoundFile, Record, sample

_BINARY_PROBE = 8000  # bytes, as in git's buffer_is_binary


def read_text(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    data, record = _whole(content, file, limits, advance)
    if not record.reason:
        _decode(record, data)
    yield record


def read_code(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    data, record = _whole(content, file, limits, advance)
    if language := language_of(file.path):
        record.metadata["code_language"] = language
    if record.reason in ("", "record_too_large") and b"\0" in data[:_BINARY_PROBE]:
        record.reason, record.text = "binary", ""
    if not record.reason:
        _decode(record, data)
    yield record


def read_html(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    data, record = _whole(content, file, limits, advance)
    if not record.reason:
        fill_page(record, data, limits)
    yield record


def _whole(content: BinaryIO, file: FoundFile, limits: ExtractConfig, advance: Advance) -> tuple[bytes, Record]:
    """A file's content, or its beginning, and a record that says what is wrong with it."""
    record = Record(1, 0, id=file.path, metadata={"path": file.inner_path})
    parts: list[bytes] = []
    for item in members(content, limits, advance, claimed_compression(file.path)):
        if isinstance(item, Fault):
            record.reason = record.reason or item.reason
            record.offset = item.offset
            record.size = record.size or item.size
            continue
        for block in item.blocks():
            record.size += len(block)
            if record.size <= limits.max_record_bytes:
                parts.append(block)
            else:
                record.reason = record.reason or "record_too_large"
                parts = [b"".join([*parts[:1], block])[:_BINARY_PROBE]]
    data = b"".join(parts)
    if not record.reason and not data.strip():
        record.reason = "empty" if data else "empty_file"
    record.text = sample(data) if record.reason else ""
    return data, record


def _decode(record: Record, data: bytes) -> None:
    """Errors are put into the record, `offset` being that of the first bad byte."""
    marks = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = dict(zip(marks, ("utf-8-sig", "utf-16", "utf-16"), strict=True)).get(
        next((mark for mark in marks if data.startswith(mark)), b""), "utf-8"
    )
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        record.reason, record.offset, record.text = "invalid_utf8", error.start, sample(data)
        return
    if (place := text.find("\0")) >= 0:
        record.reason, record.offset, record.text = "nul_bytes", place, text[:SAMPLE_BYTES]
        return
    record.text = text
