"""Readers of files that are one document each: plain text, HTML pages and source code, in folders of any depth.

Documents are named by their paths below the source's root. Text has to be in the encoding that the source's `encoding`
names, or in UTF-8, UTF-16 or UTF-32 with a byte order mark; otherwise the file is set aside. Web pages declare their
own encoding (see `page_decoding`). With `document_per = "line"` each line of a text file is a document (see
`text_lines`). A code file with a NUL byte near its start counts as binary, as in git.
"""

from collections.abc import Iterator
from typing import BinaryIO

from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.charsets import charset_of, marked_charset
from data_pipeline.reading.decompression import Fault, claimed_compression, members
from data_pipeline.reading.formats import language_of
from data_pipeline.reading.input_records import Advance, FoundFile, Record, sample
from data_pipeline.reading.page_decoding import fill_page
from data_pipeline.reading.text_lines import fill_text, read_lines

_BINARY_PROBE = 8000  # bytes in which a NUL byte is looked for, as in git's buffer_is_binary


def read_text(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    """Yields a text file as one record or, with `document_per = "line"`, one record per line."""
    if source.document_per == "line":
        yield from read_lines(content, file, source, limits, advance)
        return
    data, record = _whole(content, file, limits, advance)
    if not record.reason:
        fill_text(record, data, marked_charset(data) or charset_of(source.encoding))
    yield record


def read_code(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    """Yields a code file as one record, with its programming language in the metadata."""
    data, record = _whole(content, file, limits, advance)
    if language := language_of(file.path):
        record.metadata["code_language"] = language
    if record.reason in ("", "record_too_large") and b"\0" in data[:_BINARY_PROBE]:
        record.reason, record.text = "binary", ""
    if not record.reason:
        fill_text(record, data, marked_charset(data) or charset_of(source.encoding))
    yield record


def read_html(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    """Yields an HTML file as one record."""
    data, record = _whole(content, file, limits, advance)
    if not record.reason:
        fill_page(record, data, limits)
    yield record


def _whole(content: BinaryIO, file: FoundFile, limits: ExtractConfig, advance: Advance) -> tuple[bytes, Record]:
    """Returns a file's content, possibly only its beginning, and a record that has a reason if something is wrong."""
    record = Record(1, 0, metadata={"path": file.inner_path})
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
