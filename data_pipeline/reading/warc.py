"""WARC files, plain or compressed: responses, resources and conversions; other record types are no documents.

Reading goes on after a damaged member, and after damage within an uncompressed file. Of a record above
`extract.max_record_bytes` only the beginning is held. Bodies are decoded as their HTTP headers say (chunks, gzip,
deflate, zstd, br), within the limits on expansion. Records that continue others are left out.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecordType
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from configs.data import ExtractConfig, SourceConfig
from data_pipeline.reading.decompression import Fault, Member, claimed_compression, members
from data_pipeline.reading.http_body import CodingError, decode_body
from data_pipeline.reading.records import Advance, FoundFile, Record, sample

_HTML_TYPES = ("text/html", "application/xhtml+xml")
_PAGE_RECORDS = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
_BLOCK = 1 << 16
_MARK = b"WARC/1."


def read_warc(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    """`position` is the byte where a record, or the compressed member that holds it, begins."""
    held: Record | None = None  # the last record, until its member has proved to be whole
    for item in members(content, limits, advance, claimed_compression(file.path)):
        if isinstance(item, Fault):
            held = None
            yield Record(item.offset, item.size, reason=item.reason)
            continue
        if held:
            yield held
        held = None
        for record in _records(item, limits):
            if held:
                yield held
            held = record
    if held:
        yield held


def decode_page(payload: bytes) -> str:
    """A page as text, by its byte order mark, its own declaration, or what its bytes look like."""
    return bytes_to_str(payload, detect_encoding(payload, html5_compatible=True) or "utf-8")


def _records(member: Member, limits: ExtractConfig) -> Iterator[Record]:
    """The records of a member; damage in it is one record, and ends a compressed member."""
    stream: Any = member  # FastWARC asks for read and tell alone
    bad: Record | None = None
    going = True
    while going:
        going = False
        after = member.offset  # up to where nothing is damaged
        try:
            for entry in ArchiveIterator(stream, record_types=_PAGE_RECORDS, parse_http=True, stream_detect=False):
                position = member.offset + entry.stream_pos
                if bad:
                    bad.size = position - bad.position
                    yield bad
                    bad = None
                after = position + entry.content_length
                yield _record(entry, position, limits)
        except (OSError, ValueError) as error:
            bad = bad or Record(after, 0, str(error), reason="bad_warc")
            going = member.skip_to(_MARK, after + 1)
    if bad:
        yield bad


def _record(entry: Any, position: int, limits: ExtractConfig) -> Record:
    payload = entry.reader.read(limits.max_record_bytes + 1)
    size = len(payload)
    while block := entry.reader.read(_BLOCK):
        size += len(block)
    record = Record(position, size, id=entry.record_id or "")
    if url := entry.headers.get("WARC-Target-URI"):
        record.metadata["url"] = url.strip("<>")
    kind = (entry.http_content_type or entry.headers.get("Content-Type") or "").split(";")[0].strip().lower()
    plain = entry.record_type == WarcRecordType.conversion and kind == "text/plain"
    if size < entry.content_length:
        record.reason = "cut_record"
    elif entry.http_headers is not None and entry.http_headers.status_code not in (200, None):
        record.reason = "http_error"
    elif not plain and kind not in _HTML_TYPES:
        record.reason = "not_html" if payload.strip() else "empty"
    elif size > limits.max_record_bytes:
        record.reason = "record_too_large"
    else:
        try:
            payload = decode_body(payload, entry.http_headers, limits)
        except CodingError as error:
            record.reason = error.reason
        else:
            record.reason = "" if payload.strip() else "empty"
    record.html = not plain and not record.reason
    record.text = sample(payload) if record.reason else decode_page(payload)
    return record
