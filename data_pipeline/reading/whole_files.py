"""Content of files that have to be whole, such as evaluation files and dialogues: damage ends the reading.

A file may be plain or compressed with gzip or Zstandard, and its lines in UTF-8, UTF-16 or UTF-32; its first bytes
decide. Of a data run's sources what is damaged is set aside instead (`source_reader`).
"""

from collections.abc import Iterator
from typing import BinaryIO

from configs.sources import ExtractConfig
from data_pipeline.reading.charsets import wide_charset
from data_pipeline.reading.decompression import ARCHIVES, Fault, claimed_compression, foreign_compression, members
from data_pipeline.reading.line_splitter import Line, LineSplitter


class NotWhole(ValueError):
    """A file that cannot be read to its end; the message is the reason, and where."""


def whole_content(file: BinaryIO, name: str, limits: ExtractConfig) -> Iterator[bytes]:
    """Yields the decompressed content of a file in blocks. Raises NotWhole where it is damaged."""
    if compression := foreign_compression(file, limits):
        if compression in ARCHIVES:
            raise NotWhole(f"it is an archive ({compression}), which is not read; unpack it")
        raise NotWhole(f"it is compressed with {compression}, which is not read; compress it with gzip or Zstandard")
    for member in members(file, limits, lambda size: None, claimed_compression(name)):
        if isinstance(member, Fault):
            raise NotWhole(f"{member.reason.replace('_', ' ')} at byte {member.offset}")
        yield from member.blocks()


def whole_lines(file: BinaryIO, name: str, limits: ExtractConfig) -> Iterator[Line]:
    """Yields the lines of a file, in UTF-8. Raises NotWhole where it is damaged."""
    splitter = LineSplitter(limits.max_record_bytes, recognize=wide_charset)
    for block in whole_content(file, name, limits):
        yield from splitter.feed(block)
    yield from splitter.close()
