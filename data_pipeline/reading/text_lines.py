"""Reader of text files with one document per line, in any encoding, compressed or not; and decoding of plain text.

Blank lines are ignored. A line above `extract.max_record_bytes` is skipped without being held in memory.
"""

from collections.abc import Iterator
from typing import BinaryIO

from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.charsets import STATEFUL, WIDE, charset_of, decode_whole
from data_pipeline.reading.decompression import Fault, claimed_compression, members
from data_pipeline.reading.input_records import SAMPLE_BYTES, Advance, FoundFile, Record, sample
from data_pipeline.reading.line_splitter import Line, LineSplitter, stored_size

IS_UTF8 = "UTF-8 in place of the source's encoding"
_ENOUGH = 16  # later bytes of characters: so many in another encoding are not valid UTF-8 by chance


def read_lines(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    """Yields one record per line; a part that cannot be decompressed is one record and ends the line it begins in."""
    splitter = LineSplitter(limits.max_record_bytes, charset_of(source.encoding))
    for item in members(content, limits, advance, claimed_compression(file.path)):
        if isinstance(item, Fault):
            line = splitter.break_off()
            yield _named(
                Record(line.number, line.size, sample(line.content), reason=item.reason, offset=line.offset), file
            )
            continue
        for block in item.blocks():
            for line in splitter.feed(block):
                yield from _record(line, splitter, file)
    for line in splitter.close():
        yield from _record(line, splitter, file)


def _record(line: Line, splitter: LineSplitter, file: FoundFile) -> Iterator[Record]:
    """Yields the record of a line, or nothing if the line is blank."""
    record = _named(Record(line.number, line.size, offset=line.offset), file)
    content = line.content.removesuffix(b"\r")
    if line.too_long:
        record.reason, record.text = "record_too_large", sample(content)
    elif not content.strip():
        return
    else:
        if splitter.converted:
            fill_text(record, content, "utf-8")
            if record.reason:
                record.offset = line.offset + stored_size(content[: record.offset], splitter.charset)
        else:
            fill_text(record, content, splitter.charset, line.offset)
        if record.reason == "invalid_utf8":
            record.reason = _undecodable(splitter.charset)
        if not record.reason and not record.text.strip():
            return
    yield record


def _named(record: Record, file: FoundFile) -> Record:
    record.metadata["path"] = file.inner_path
    return record


def fill_text(record: Record, content: bytes, charset: str, start: int = 0) -> None:
    """Sets the text of a record, or the reason why it cannot be decoded and the offset of the first bad byte.

    `start` is the byte offset of `content` in the file. Valid UTF-8 is decoded as such, whatever `charset` says.
    """
    if not charset.startswith(("utf", *STATEFUL)) and _is_utf8(content):
        charset = "utf-8"
        record.notes.add(IS_UTF8)
    try:
        text = decode_whole(content, charset)
    except UnicodeDecodeError as error:
        record.reason, record.text = _undecodable(charset), sample(content)
        record.offset = start + error.start
        return
    if (position := text.find("\0")) >= 0:
        is_wide = charset.startswith(WIDE)
        after = stored_size(text[position:].encode(), charset) if is_wide else len(content) - content.index(0)
        record.reason, record.text = "nul_bytes", text[:SAMPLE_BYTES]
        record.offset = start + len(content) - after
        return
    record.text = text


def _is_utf8(content: bytes) -> bool:
    try:
        return len(content) - len(content.decode()) >= _ENOUGH
    except UnicodeDecodeError:
        return False


def _undecodable(charset: str) -> str:
    """Returns the reason for text that is not valid in `charset`, such as invalid_utf8."""
    if charset.startswith(WIDE):
        return f"invalid_{charset[:6].replace('-', '')}"
    return "invalid_utf8" if charset == "utf-8" else "undecodable"
