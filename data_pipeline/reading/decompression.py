"""Streams over gzip, Zstandard and plain files that use bounded memory and survive damage, truncation and zip bombs.

A compressed file is a sequence of members (gzip, RFC 1952) or frames (Zstandard, RFC 8878), both called members here;
an uncompressed file is one member. `members` yields each as a readable stream and, after a member that turns out to be
damaged, a `Fault`; reading goes on at the next undamaged member. Zeros after a member are padding. The first bytes of a
file decide how it is compressed, not its name. Random access is not supported.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import zstandard

from configs.sources import ExtractConfig
from data_pipeline.reading.input_records import NOT_READ, Advance

BLOCK = 1 << 16
# Expansion is judged only above this many bytes of content: a short repetitive file is no zip bomb.
_RATIO_FLOOR = 1 << 20
# Bytes fed to the decompressor at once. One byte of a Zstandard frame expands to at most 32 KiB, so these to 16 MiB.
_ZSTD_FEED = 1 << 9
# The largest window that the zstd command accepts without --long; the window is held in memory.
_ZSTD_MAX_WINDOW = 1 << 27
_MAGICS = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd"}
# What files of other compressions and archives begin with.
_FOREIGN = {
    **{
        "bzip2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
        "xz": rb"\xfd7zXZ\x00",
        "LZ4": rb"\x04\x22M\x18",
        "compress": rb"\x1f\x9d",
    },
    "tar": rb"[^\0][\0-\xff]{256}ustar[ \0]",
    **{"zip": rb"PK\x03\x04", "7-Zip": rb"7z\xbc\xaf\x27\x1c", "RAR": rb"Rar!\x1a\x07", "lzip": rb"LZIP\x01"},
}
ARCHIVES = ("tar", "zip", "7-Zip", "RAR")
_HEAD = 264  # bytes that show what a file begins like
_SKIPPABLE = tuple(bytes([0x50 + number, 0x2A, 0x4D, 0x18]) for number in range(16))


@dataclass(frozen=True)
class Fault:
    """Part of a file that cannot be decompressed: its first byte, its size in bytes on storage, and the reason."""

    offset: int
    size: int
    reason: str


class _Stop(Exception):
    """Raised when a member cannot be read any further; `reason` becomes that of its Fault."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Gzip:
    def __init__(self) -> None:
        self._inflater = zlib.decompressobj(wbits=31)

    def step(self, data: memoryview) -> tuple[bytes, memoryview, bool]:
        """Returns (content, the unread rest of `data`, whether the member ended); raises _Stop if it is damaged."""
        try:
            content = self._inflater.decompress(data, BLOCK)
        except zlib.error:
            raise _Stop("corrupt_gzip") from None
        left = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail
        return content, data[len(data) - len(left) :], self._inflater.eof


class _Zstd:
    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW).decompressobj()

    def step(self, data: memoryview) -> tuple[bytes, memoryview, bool]:
        """Returns (content, the unread rest of `data`, whether the frame ended); raises _Stop if it is damaged."""
        fed = data[:_ZSTD_FEED]
        try:
            content = self._frame.decompress(fed)
        except zstandard.ZstdError as error:
            reasons = {"too much memory": "zstd_window_too_large", "Dictionary": NOT_READ}
            raise _Stop(next((reasons[why] for why in reasons if why in str(error)), "corrupt_zstd")) from None
        left = len(self._frame.unused_data) if self._frame.eof else 0
        return content, data[len(fed) - left :], self._frame.eof


_CODECS: dict[str, type[_Gzip | _Zstd]] = {"gzip": _Gzip, "zstd": _Zstd}


class Member:
    """Content of one member as a stream that can be read once.

    The stream also ends where the member cannot be read any further; `reason` then says why.
    """

    def __init__(self, source: "_Source", offset: int) -> None:
        self.offset = offset
        self.reason = ""
        self.ended = False
        self._source = source
        self._codec = _CODECS[source.kind]() if source.kind else None
        self._buffer = memoryview(b"")
        self._position = 0
        self._produced = 0

    @property
    def compressed(self) -> bool:
        """Whether the member is compressed."""
        return self._codec is not None

    def read(self, size: int = -1) -> bytes:
        """Returns up to `size` bytes, at most one block; b"" at the end."""
        while not self._buffer and not self.ended:
            self._fill()
        taken = self._buffer[:size] if size >= 0 else self._buffer
        self._buffer = self._buffer[len(taken) :]
        self._position += len(taken)
        return bytes(taken)

    def tell(self) -> int:
        """Returns how many bytes of content have been read since `offset`."""
        return self._position

    def blocks(self) -> Iterator[bytes]:
        """Yields the rest of the content in blocks."""
        while block := self.read():
            yield block

    def skip_to(self, mark: bytes, start: int) -> bool:
        """Moves to the first `mark` at or after byte `start` that follows a line end or a zero; returns whether there
        is one.

        Always False for a compressed member.
        """
        found = -1 if self._codec else self._source.find((b"\n" + mark, b"\0" + mark), start)
        if found >= 0:
            self._restart(found + 1)
        return found >= 0

    def find(self, mark: bytes, start: int) -> int:
        """Returns the position of the first `mark` at or after byte `start` of an uncompressed file, or -1.

        It moves the read position of the file.
        """
        return self._source.find((mark,), start)

    def pass_padding(self, start: int) -> int:
        """Returns the position of the first byte at or after `start` that is neither zero nor a line end, or -1.

        It moves the read position of the file, which has to be uncompressed.
        """
        self._source.seek(start)
        return self._source.position if self._source.pass_over(b"\0\r\n") else -1

    def goes_on_with(self, mark: bytes, start: int) -> bool:
        """Moves to byte `start` of an uncompressed file if `mark` is there; returns whether it is."""
        self._source.seek(start)
        if not self._source.begins_with(mark):
            return False
        self._restart(start)
        return True

    def _restart(self, start: int) -> None:
        self._source.seek(start)
        self.offset, self._position, self._buffer, self.ended = start, 0, memoryview(b""), False

    def _fill(self) -> None:
        """Reads the next block of content into the buffer, or ends the member."""
        data = self._source.peek()
        if self._codec is None:
            self._buffer = data
            self._source.consume(len(data))
            self.ended = not data
            return
        try:
            if not data:
                raise _Stop(f"cut_{self._source.kind}")
            content, left, self.ended = self._codec.step(data)
            self._source.consume(len(data) - len(left))
            self._produced += len(content)
            self._source.check(self._produced, len(content), self.offset)
            self._buffer = memoryview(content)
        except _Stop as stop:
            self.reason, self.ended = stop.reason, True


class _Source:
    """Bytes of a file as stored, how they are compressed, and how much content they have expanded to so far."""

    def __init__(self, file: BinaryIO, limits: ExtractConfig, advance: Advance) -> None:
        self.file = file
        self.position = 0  # of the next byte that no member has consumed
        self.exhausted = False  # whether the whole file has expanded beyond extract.max_expanded_bytes
        self._limits = limits
        self._advance = advance
        self._furthest = 0
        self._total = 0
        self._data = memoryview(b"")
        head = bytes(self.peek()[:4])
        self.kind = next((kind for kind, magic in _MAGICS.items() if head.startswith(magic)), "")
        if head in _SKIPPABLE:
            self.kind = "zstd"

    def peek(self) -> memoryview:
        """Returns the next stored bytes without consuming them; nothing at the end of the file."""
        if not self._data:
            self._data = memoryview(self.file.read(BLOCK))
        return self._data

    def consume(self, size: int) -> None:
        """Marks the next `size` stored bytes as read, and reports progress for those not read before."""
        self._data = self._data[size:]
        self.position += size
        if self.position > self._furthest:
            self._advance(self.position - self._furthest)
            self._furthest = self.position

    def pass_over(self, padding: bytes) -> bool:
        """Skips the bytes that are in `padding`; returns whether anything comes after them."""
        while data := self.peek():
            left = len(bytes(data).lstrip(padding))
            self.consume(len(data) - left)
            if left:
                return True
        return False

    def seek(self, position: int) -> None:
        """Moves to a position in the stored bytes."""
        self.file.seek(position)
        self._data = memoryview(b"")
        self.position = position

    def check(self, produced: int, fresh: int, start: int) -> None:
        """Counts `fresh` bytes of content; raises _Stop if the member at `start`, or the file, expands too much.

        `produced` is the content of this member so far, in bytes.
        """
        self._total += fresh
        if self._total > self._limits.max_expanded_bytes:
            self.exhausted = True
            raise _Stop("expansion_limit")
        if is_bomb(produced, self.position - start, self._limits):
            raise _Stop("expansion_limit")

    def begins_with(self, mark: bytes) -> bool:
        """Consumes as many bytes as `mark` has; returns whether they were `mark`."""
        head = b""
        while len(head) < len(mark) and (data := self.peek()):
            head += bytes(data[: len(mark) - len(head)])
            self.consume(min(len(data), len(mark)))
        return head == mark

    def find(self, marks: tuple[bytes, ...], start: int) -> int:
        """Returns the first position at or after byte `start` of any of `marks`, which have one length, or -1."""
        self.seek(start)
        tail = b""
        while data := self.peek():
            window = tail + bytes(data)
            if found := [index for mark in marks if (index := window.find(mark)) >= 0]:
                return self.position - len(tail) + min(found)
            tail = window[-len(marks[0]) + 1 :]
            self.consume(len(data))
        return -1


def is_bomb(produced: int, consumed: int, limits: ExtractConfig) -> bool:
    """Whether `produced` bytes of content are more than `extract.max_expansion` allows for `consumed` stored bytes."""
    return produced > _RATIO_FLOOR and produced > limits.max_expansion * consumed


def members(file: BinaryIO, limits: ExtractConfig, advance: Advance, claimed: str = "") -> Iterator[Member | Fault]:
    """Yields the members of a seekable file; each has to be read before the next one is requested.

    `claimed` is the compression that the file's name states ("gzip", "zstd", or "" for none). A file that is named as
    compressed and is not yields a single Fault.
    """
    source = _Source(file, limits, advance)
    if claimed and not source.kind and source.peek():
        size = sum(len(block) for block in Member(source, 0).blocks())
        yield Fault(0, size, f"corrupt_{claimed}")
        return
    if not source.kind:
        yield Member(source, 0)
        return
    while source.pass_over(b"\0"):  # zeros pad a member to a full block; gzip skips them too
        member = Member(source, source.position)
        yield member
        while not member.ended:
            member.read()
        if member.reason:
            following = -1 if source.exhausted else _next_sound(source, member.offset + 1, limits)
            end = following if following >= 0 else _end(source)
            # If an undamaged member follows, the file is not truncated: the lengths in this member are wrong.
            reason = member.reason.replace("cut_", "corrupt_") if following >= 0 else member.reason
            yield Fault(member.offset, end - member.offset, reason)
            source.seek(end)


def _next_sound(source: _Source, start: int, limits: ExtractConfig) -> int:
    """Returns the first position at or after `start` at which a readable member begins, or -1.

    The member's first block is read as a test, since its magic number may occur in other data by chance.
    """
    while (found := source.find((_MAGICS[source.kind],), start)) >= 0:
        source.seek(found)
        probe = Member(source, found)
        probe.read()
        if not probe.reason:
            return found
        start = found + 1
    return -1


def _end(source: _Source) -> int:
    """Reads to the end of the file and returns the file's size in bytes."""
    while data := source.peek():
        source.consume(len(data))
    return source.position


def foreign_compression(file: BinaryIO, limits: ExtractConfig) -> str:
    """Returns the compression or archive that a seekable file begins like, if it is one that is not read, else "".

    What is within gzip or Zstandard is looked at too, since an archive there would be read as if it were text. The file
    is left at its start.
    """
    source = _Source(file, limits, lambda size: None)
    first, head = Member(source, 0), b""
    while len(head) < _HEAD and (block := first.read(_HEAD)):
        head += block
    file.seek(0)
    if source.kind and (inner := next((name for name, magic in _MAGICS.items() if head.startswith(magic)), "")):
        return f"{inner} within {source.kind}"
    return next((name for name, magic in _FOREIGN.items() if re.match(magic, head)), "")


def claimed_compression(path: str) -> str:
    """Returns the compression that a file's name states: "gzip" for .gz, "zstd" for .zst, else ""."""
    return {"gz": "gzip", "zst": "zstd"}.get(path.rsplit(".", 1)[-1].lower(), "")
