"""Reader of text files with one document per line, in any encoding, compressed or not; and decoding of plain text.

Blank lines are ignored. A line above `extract.max_record_bytes` is skipped without being held in memory. Lines end with
LF or CRLF; a lone CR, as in files of old Macs, does not end a line.
"""

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.charsets import LENIENT, STATEFUL, WIDE, charset_of, decode_whole, marked_charset
from data_pipeline.reading.decompression import Fault, Member, claimed_compression, members
from data_pipeline.reading.jsonl import Line, LineSplitter
from data_pipeline.reading.records import SAMPLE_BYTES, Advance, FoundFile, Record, sample

_LONGEST_MARK = 4  # bytes of a byte order mark


def read_lines(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    """Yields one record per line; a part that cannot be decompressed is one record and ends the line it begins in."""
    splitter = LineSplitter(limits.max_record_bytes)
    blocks = _Blocks(charset_of(source.encoding))
    for item in members(content, limits, advance, claimed_compression(file.path)):
        if isinstance(item, Fault):
            line = splitter.close()
            yield _named(
                Record(line.number, line.size, sample(line.content), reason=item.reason, offset=line.offset), file
            )
            continue
        for block in blocks.of(item):
            for line in splitter.feed(block):
                yield from _record(line, blocks, file)
    for line in splitter.feed(blocks.rest()):
        yield from _record(line, blocks, file)
    yield from _record(splitter.close(), blocks, file)


class _Blocks:
    """Converts a file's blocks to an encoding in which line feeds can be found and each line decoded by itself.

    UTF-16, UTF-32 and stateful encodings become UTF-8; all others stay as they are.
    """

    def __init__(self, charset: str) -> None:
        self.charset = charset
        self._start: bytes | None = b""  # the file's first bytes, held until a byte order mark would be complete
        self._decoder: codecs.IncrementalDecoder | None = None

    @property
    def converted(self) -> bool:
        """Whether blocks are converted to UTF-8."""
        return self._decoder is not None

    def of(self, member: Member) -> Iterator[bytes]:
        """Yields the blocks of a member, converted if the encoding requires it."""
        for block in member.blocks():
            if self._start is not None:
                self._start += block
                if len(self._start) < _LONGEST_MARK:
                    continue
                block = self._begin()
            yield self._convert(block)

    def rest(self) -> bytes:
        """Returns the bytes still held back at the end of the file."""
        return self._convert(self._begin() if self._start is not None else b"", final=True)

    def _begin(self) -> bytes:
        start, self._start = self._start or b"", None
        self.charset = marked_charset(start) or self.charset
        if self.charset.startswith((*WIDE, *STATEFUL)):
            self._decoder = codecs.getincrementaldecoder(self.charset)(LENIENT)
        return start

    def _convert(self, block: bytes, final: bool = False) -> bytes:
        return self._decoder.decode(block, final).encode("utf-8", "replace") if self._decoder else block


def _record(line: Line, blocks: _Blocks, file: FoundFile) -> Iterator[Record]:
    """Yields the record of a line, or nothing if the line is blank."""
    record = _named(Record(line.number, line.size, offset=line.offset), file)
    content = line.content.removesuffix(b"\r")
    if line.too_long:
        record.reason, record.text = "record_too_large", sample(content)
    elif not content.strip():
        return
    elif blocks.converted and "\ufffd".encode() in content:
        record.reason, record.text = _undecodable(blocks.charset), sample(content)
    else:
        fill_text(record, content, "utf-8" if blocks.converted else blocks.charset, line.offset)
        if not record.reason and not record.text.strip():
            return
    yield record


def _named(record: Record, file: FoundFile) -> Record:
    record.metadata["path"] = file.inner_path
    return record


def fill_text(record: Record, content: bytes, charset: str, start: int = 0) -> None:
    """Sets the text of a record, or the reason why it cannot be decoded and the offset of the first bad byte.

    `start` is the byte offset of `content` in the file.
    """
    try:
        text = decode_whole(content, charset)
    except UnicodeDecodeError as error:
        record.reason, record.text = _undecodable(charset), sample(content)
        record.offset = start + error.start
        return
    if (position := text.find("\0")) >= 0:
        record.reason, record.offset, record.text = "nul_bytes", start + position, text[:SAMPLE_BYTES]
        return
    record.text = text


def _undecodable(charset: str) -> str:
    """Returns the reason for text that is not valid in `charset`, such as invalid_utf8."""
    if charset.startswith(WIDE):
        return f"invalid_{charset[:6].replace('-', '')}"
    return "invalid_utf8" if charset == "utf-8" else "undecodable"
