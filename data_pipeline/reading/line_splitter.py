"""Splits the content of a file into lines, in memory bounded whatever the lines' length, and whatever the encoding.

Lines end with LF or CRLF; a lone CR, as in files of old Macs, does not end a line. UTF-16, UTF-32 and stateful
encodings, in which a line feed cannot be found byte by byte, are converted to UTF-8 first.
"""

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_pipeline.reading.charsets import STATEFUL, WIDE, incremental_decoder, marked_charset
from data_pipeline.reading.input_records import SAMPLE_BYTES

_LONGEST_MARK = 4  # bytes of a byte order mark
_LATER = bytes(range(0x80, 0xC0))  # bytes of UTF-8 after the first of a character
_FIRST_OF_FOUR = bytes(range(0xF0, 0xF8))


def stored_size(text: bytes, charset: str) -> int:
    """Returns how many bytes a text, given in UTF-8, has in UTF-16 or UTF-32; in other encodings its own length."""
    if not charset.startswith(WIDE):
        return len(text)
    firsts = text.translate(None, _LATER)
    if charset.startswith("utf-32"):
        return 4 * len(firsts)
    return 2 * (2 * len(firsts) - len(firsts.translate(None, _FIRST_OF_FOUR)))  # two units where UTF-8 has four bytes


@dataclass
class Line:
    """A line of a file: its number (from 1), byte offset in the decompressed content, size without line end, content.

    If `too_long`, `content` is only the beginning of the line. Offset and size count bytes as they are stored; in a
    stateful encoding, whose lines have no bytes of their own, they count those of the conversion to UTF-8.
    """

    number: int
    offset: int
    size: int
    content: bytes
    too_long: bool


class LineSplitter:
    """Splits blocks of bytes into lines; holds at most about `limit` bytes of a line.

    `charset` is the encoding of a file that does not begin with a byte order mark, unless `recognize` tells another one
    from its first bytes. Text in a wide or stateful encoding becomes UTF-8, and what cannot be decoded a lone
    surrogate, so that its line is not valid UTF-8.
    """

    def __init__(
        self, limit: int, charset: str = "utf-8", recognize: Callable[[bytes], str] = lambda start: ""
    ) -> None:
        self.charset = charset
        self._recognize = recognize
        self._limit = limit
        self._start: bytes | None = b""  # the file's first bytes, held until a byte order mark would be complete
        self._decoder: codecs.IncrementalDecoder | None = None
        self._parts: list[bytes] = []
        self._size = self._stored = 0
        self._held = 0
        self._number = 1
        self._offset = 0

    @property
    def converted(self) -> bool:
        """Whether lines are converted to UTF-8."""
        return self._decoder is not None

    def feed(self, block: bytes) -> Iterator[Line]:
        """Yields the lines that the next block completes."""
        if self._start is not None:
            self._start += block
            if len(self._start) < _LONGEST_MARK:
                return
            block = self._begin()
        yield from self._split(self._convert(block))

    def close(self) -> Iterator[Line]:
        """Yields the lines that are left at the end of the file, of which the last one may be empty."""
        block = self._begin() if self._start is not None else b""
        yield from self._split(self._convert(block, final=True))
        yield self._line()

    def break_off(self) -> Line:
        """Returns what came after the last line end as a line, which may be empty, where the file cannot be read on."""
        if self._decoder:
            self._decoder.reset()
        return self._line()

    def _begin(self) -> bytes:
        start, self._start = self._start or b"", None
        self.charset = marked_charset(start) or self._recognize(start) or self.charset
        if self.charset.startswith((*WIDE, *STATEFUL)):
            self._decoder = incremental_decoder(self.charset)
        return start

    def _convert(self, block: bytes, final: bool = False) -> bytes:
        return self._decoder.decode(block, final).encode("utf-8", "surrogatepass") if self._decoder else block

    def _split(self, block: bytes) -> Iterator[Line]:
        *ends, rest = block.split(b"\n")
        for end in ends:
            self._add(end)
            yield self._line()
        self._add(rest)

    def _add(self, part: bytes) -> None:
        self._size += len(part)
        self._stored += stored_size(part, self.charset)
        if self._size <= self._limit:
            self._parts.append(part)
        elif self._held <= self._limit:  # the line has just become too long: keep its beginning
            self._parts = [b"".join([*self._parts, part])[:SAMPLE_BYTES]]
        self._held = self._size

    def _line(self) -> Line:
        line = Line(self._number, self._offset, self._stored, b"".join(self._parts), self._size > self._limit)
        self._number += 1
        self._offset += self._stored + stored_size(b"\n", self.charset)
        self._parts, self._size, self._stored, self._held = [], 0, 0, 0
        return line
