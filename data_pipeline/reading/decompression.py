"""Gzip and Zstandard files as streams of bounded memory that survive damage, truncation and bombs.

A file is a row of members (gzip, RFC 1952) or frames (Zstandard, RFC 8878), or itself where it is not compressed.
`members` yields each as a readable stream and, after one that turns out to be damaged, a `Fault`; reading then goes on
at the next sound member. Zeros behind a member are padding. What a file is, its first bytes decide, not its name.
Random access is left out.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import zstandard

from configs.sources import ExtractConfig
from data_pipeline.reading.records import Advance

BLOCK = 1 << 16
# Below this much content a member's ratio says nothing: a short repetitive file is no bomb.
_RATIO_FLOOR = 1 << 20
# One byte of a Zstandard frame makes at most 32 KiB, so that so many bytes make at most 16 MiB at once.
_ZSTD_FEED = 1 << 9
# What the zstd command decodes without --long; the window is held in memory.
_ZSTD_MAX_WINDOW = 1 << 27
_MAGICS = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd"}
_SKIPPABLE = tuple(bytes([0x50 + number, 0x2A, 0x4D, 0x18]) for number in range(16))


@dataclass(frozen=True)
class Fault:
    """A stretch of a file that cannot be decompressed: its first byte, its bytes on storage, and why."""

    offset: int
    size: int
    reason: str


class _Stop(Exception):
    """A member cannot be read any further."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Gzip:
    def __init__(self) -> None:
        self._inflater = zlib.decompressobj(wbits=31)

    def step(self, data: memoryview) -> tuple[bytes, memoryview, bool]:
        """(content, what of `data` is left, whether the member ended). Errors: _Stop."""
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
        """As _Gzip's."""
        fed = data[:_ZSTD_FEED]
        try:
            content = self._frame.decompress(fed)
        except zstandard.ZstdError as error:
            raise _Stop("zstd_window_too_large" if "too much memory" in str(error) else "corrupt_zstd") from None
        left = len(self._frame.unused_data) if self._frame.eof else 0
        return content, data[len(fed) - left :], self._frame.eof


_CODECS: dict[str, type[_Gzip | _Zstd]] = {"gzip": _Gzip, "zstd": _Zstd}


class Member:
    """One member's content, for reading once. Ends, with a `reason`, where the member cannot be read any further."""

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
        return self._codec is not None

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, a block at most; none at the end."""
        while not self._buffer and not self.ended:
            self._fill()
        taken = self._buffer[:size] if size >= 0 else self._buffer
        self._buffer = self._buffer[len(taken) :]
        self._position += len(taken)
        return bytes(taken)

    def tell(self) -> int:
        return self._position

    def blocks(self) -> Iterator[bytes]:
        while block := self.read():
            yield block

    def skip_to(self, mark: bytes, start: int) -> bool:
        """Goes on at the first `mark` behind a line's end or a zero, from byte `start` of an uncompressed file on, if
        there is one.
        """
        found = -1 if self._codec else self._source.find((b"\n" + mark, b"\0" + mark), start)
        if found >= 0:
            self._restart(found + 1)
        return found >= 0

    def find(self, mark: bytes, start: int) -> int:
        """Where `mark` is next in an uncompressed file, from byte `start` on; -1 for nowhere. Moves what is read."""
        return self._source.find((mark,), start)

    def pass_padding(self, start: int) -> int:
        """The first byte of an uncompressed file, from `start` on, that is no zero and no line end; -1 for none."""
        self._source.seek(start)
        return self._source.position if self._source.pass_over(b"\0\r\n") else -1

    def goes_on_with(self, mark: bytes, start: int) -> bool:
        """Goes on at byte `start` of an uncompressed file, if `mark` is there."""
        self._source.seek(start)
        if not self._source.begins_with(mark):
            return False
        self._restart(start)
        return True

    def _restart(self, start: int) -> None:
        self._source.seek(start)
        self.offset, self._position, self._buffer, self.ended = start, 0, memoryview(b""), False

    def _fill(self) -> None:
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
    """The compressed bytes of a file, its kind, and how much came of them."""

    def __init__(self, file: BinaryIO, limits: ExtractConfig, advance: Advance) -> None:
        self.file = file
        self.position = 0  # of the next byte that no member has consumed
        self.exhausted = False  # the file as a whole is over its limit
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
        if not self._data:
            self._data = memoryview(self.file.read(BLOCK))
        return self._data

    def consume(self, size: int) -> None:
        self._data = self._data[size:]
        self.position += size
        if self.position > self._furthest:
            self._advance(self.position - self._furthest)
            self._furthest = self.position

    def pass_over(self, padding: bytes) -> bool:
        """Goes over bytes that are among `padding`; whether anything is left."""
        while data := self.peek():
            left = len(bytes(data).lstrip(padding))
            self.consume(len(data) - left)
            if left:
                return True
        return False

    def seek(self, position: int) -> None:
        self.file.seek(position)
        self._data = memoryview(b"")
        self.position = position

    def check(self, produced: int, fresh: int, start: int) -> None:
        """Errors: _Stop when the member that began at `start`, or the file, expands beyond what is allowed."""
        self._total += fresh
        if self._total > self._limits.max_expanded_bytes:
            self.exhausted = True
            raise _Stop("expansion_limit")
        if is_bomb(produced, self.position - start, self._limits):
            raise _Stop("expansion_limit")

    def begins_with(self, mark: bytes) -> bool:
        """Whether `mark` is next. Moves what is read."""
        head = b""
        while len(head) < len(mark) and (data := self.peek()):
            head += bytes(data[: len(mark) - len(head)])
            self.consume(min(len(data), len(mark)))
        return head == mark

    def find(self, marks: tuple[bytes, ...], start: int) -> int:
        """Where one of `marks`, all of one length, is next, from `start` on; -1 for nowhere."""
        self.seek(start)
        tail = b""
        while data := self.peek():
            window = tail + bytes(data)
            if found := [place for mark in marks if (place := window.find(mark)) >= 0]:
                return self.position - len(tail) + min(found)
            tail = window[-len(marks[0]) + 1 :]
            self.consume(len(data))
        return -1


def is_bomb(produced: int, consumed: int, limits: ExtractConfig) -> bool:
    """Whether so many bytes of content are more than `consumed` bytes on storage may hold."""
    return produced > _RATIO_FLOOR and produced > limits.max_expansion * consumed


def members(file: BinaryIO, limits: ExtractConfig, advance: Advance, claimed: str = "") -> Iterator[Member | Fault]:
    """The members of a seekable file, each to be read before the next is asked for.

    `claimed` is the compression that the file's name promises ("gzip", "zstd"): one that does not keep it is one Fault.
    """
    source = _Source(file, limits, advance)
    if claimed and not source.kind and source.peek():
        size = sum(len(block) for block in Member(source, 0).blocks())
        yield Fault(0, size, f"corrupt_{claimed}")
        return
    if not source.kind:
        yield Member(source, 0)
        return
    while source.pass_over(b"\0"):  # what fills up blocks behind a member, as gzip does
        member = Member(source, source.position)
        yield member
        while not member.ended:
            member.read()
        if member.reason:
            following = -1 if source.exhausted else _next_sound(source, member.offset + 1, limits)
            end = following if following >= 0 else _end(source)
            # With a sound member after it, one that runs over the file's end is not cut: its lengths are wrong.
            reason = member.reason.replace("cut_", "corrupt_") if following >= 0 else member.reason
            yield Fault(member.offset, end - member.offset, reason)
            source.seek(end)


def _next_sound(source: _Source, start: int, limits: ExtractConfig) -> int:
    """Where a member begins whose first block can be read; -1 for nowhere. A magic number may turn up by chance."""
    while (found := source.find((_MAGICS[source.kind],), start)) >= 0:
        source.seek(found)
        probe = Member(source, found)
        probe.read()
        if not probe.reason:
            return found
        start = found + 1
    return -1


def _end(source: _Source) -> int:
    while data := source.peek():
        source.consume(len(data))
    return source.position


def claimed_compression(path: str) -> str:
    return {"gz": "gzip", "zst": "zstd"}.get(path.rsplit(".", 1)[-1].lower(), "")
