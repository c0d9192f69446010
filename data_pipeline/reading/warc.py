"""Reader of WARC files, plain or compressed: responses, resources and conversions; other record types are skipped.

Reading goes on after a damaged member, and after damage within an uncompressed file. Only the beginning of a record
above `extract.max_record_bytes` is held in memory. `http_body` decodes bodies as their HTTP headers say (chunks, gzip,
deflate, zstd, br), within the limits on expansion, and `page_decoding` turns pages into text. A response without a type
counts as a page if it begins like HTML. A record in segments is set aside as a cut one, and so is a record whose length
is wrong. Pages that a crawler cut short are kept and counted.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecordType

from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.decompression import Fault, Member, claimed_compression, members
from data_pipeline.reading.http_body import CodingError, decode_body
from data_pipeline.reading.http_response import (
    MAX_HEADER_BYTES,
    Response,
    is_type_unknown,
    looks_like_page,
    mime_type,
    parse_response,
)
from data_pipeline.reading.input_records import SAMPLE_BYTES, Advance, FoundFile, Record, sample
from data_pipeline.reading.page_decoding import fill_page

_HTML_TYPES = ("text/html", "application/xhtml+xml")
_PAGE_RECORDS = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
_ANY = WarcRecordType.any_type
_BLOCK = 1 << 16
TRUNCATED = "cut short by the crawler"  # its WARC-Truncated says so
_MARK, _HEAD_END = b"WARC/1.", b"\r\n\r\n"


def read_warc(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    """Yields the records of a file; `position` is the byte where a record, or its compressed member, begins."""
    # A member's last record, or a cut one and what is no record after it, until the member has proved undamaged.
    held: list[Record] = []
    for item in members(content, limits, advance, claimed_compression(file.path)):
        if isinstance(item, Fault):
            held = []
            yield Record(item.offset, item.size, reason=item.reason)
            continue
        yield from held
        held = []
        for record in _records(item, limits):
            if not (held and held[-1].reason == "cut_record" and record.reason == "bad_warc"):
                yield from held
                held = []
            held.append(record)
    yield from held


def _records(member: Member, limits: ExtractConfig) -> Iterator[Record]:
    """Yields the records of a member; a damaged part is one record, after which a compressed member ends.

    Zeros between records, or after the last one, are padding and no damage.
    """
    stream: Any = member  # FastWARC needs only read and tell
    bad: Record | None = None
    page: Record | None = None  # the last one, until what follows shows that its length was right
    going = True
    while going:
        going = False
        last: tuple[int, int] | None = None  # position of the last undamaged record, and the length of its content
        try:
            for entry in ArchiveIterator(stream, record_types=_ANY, parse_http=False, stream_detect=False):
                position = member.offset + entry.stream_pos
                if page:
                    yield page
                    page = None
                if bad:
                    bad.size = position - bad.position
                    yield bad
                    bad = None
                last = position, entry.content_length
                if entry.record_type & _PAGE_RECORDS:
                    page = _record(entry, position, limits)
        except (OSError, ValueError) as error:
            end = _end_of(member, *last) if last and not bad else None
            following = -1 if end is None else member.pass_padding(end)
            if end is not None and following < 0:
                break
            if end is not None and following > end and member.goes_on_with(_MARK, following):
                going = True
                continue
            if page and last and not page.reason and (end is None or following == end):
                page.reason, page.html, page.text = "cut_record", False, page.text[:SAMPLE_BYTES]
            after = sum(last) if last else member.offset  # the byte up to which nothing is damaged
            bad = bad or Record(after, 0, str(error), reason="bad_warc")
            going = member.skip_to(_MARK, after + 1)
    if page:
        yield page
    if bad:
        yield bad


def _end_of(member: Member, position: int, length: int) -> int | None:
    """Returns the byte at which a record's content ends, without the line ends after it.

    Returns None for a compressed member, or if the end of the record's headers is not found.
    """
    head = -1 if member.compressed else member.find(_HEAD_END, position)
    return None if head < 0 else head + len(_HEAD_END) + length


def _record(entry: Any, position: int, limits: ExtractConfig) -> Record:
    """Makes a record of a FastWARC record: a page or text, or a sample with the reason why it cannot be used."""
    content = entry.reader.read(MAX_HEADER_BYTES + limits.max_record_bytes + 1)
    stored = len(content)
    while block := entry.reader.read(_BLOCK):
        stored += len(block)
    warc_type = entry.headers.get("Content-Type") or ""
    is_http = entry.record_type == WarcRecordType.response and mime_type(warc_type) in ("application/http", "")
    response = parse_response(content) if is_http else Response(headers=[("content-type", warc_type)])
    body = content[response.body_start :]
    record = Record(position, stored - response.body_start, id=entry.record_id or "")
    if url := entry.headers.get("WARC-Target-URI"):
        record.metadata["url"] = url.strip("<>")
    kind = mime_type(response.content_type())
    if is_type_unknown(kind):
        kind = mime_type(entry.headers.get("WARC-Identified-Payload-Type") or "")
    plain = entry.record_type == WarcRecordType.conversion and kind == "text/plain"
    if entry.headers.get("WARC-Truncated"):
        record.notes.add(TRUNCATED)
    if stored < entry.content_length or "Content-Length" not in entry.headers or "WARC-Segment-Number" in entry.headers:
        record.reason = "cut_record"
    elif not response.has_page():
        record.reason = "http_error"
    elif not plain and kind not in _HTML_TYPES and not is_type_unknown(kind):
        record.reason = "not_html" if body.strip() else "empty"
    elif record.size > limits.max_record_bytes:
        record.reason = "record_too_large"
    else:
        try:
            body = decode_body(body, response, limits)
        except CodingError as error:
            record.reason = error.reason
        else:
            record.reason = "" if body.strip() else "empty"
            if not record.reason and is_type_unknown(kind) and not looks_like_page(body):
                record.reason = "not_html"
    if record.reason:
        record.text = sample(body)
    else:
        fill_page(record, body, limits, response.content_type(), markup=not plain)
    return record
