"""Copies of ranks' files on another node's disk, sent over a gloo group: which ranks share a disk, and the exchange."""

import contextlib
import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from configs.files import sync
from configs.loader import ConfigError

BLOCK = 8 << 20  # bytes sent at a time
Facts = Mapping[str, Mapping[str, Any]]  # size and SHA-256 of files by name


def disks(folder: Path, rank: int, gather: Callable[[Any], list[Any]]) -> list[list[int]]:
    """Returns the ranks by the disk that `folder` is on, where a file that one rank makes is seen by others.

    Collective; `gather` returns the values of all ranks. Folders that were made for this are removed again. Raises
    ConfigError on all ranks if one cannot write there.
    """
    token, fault = gather(uuid.uuid4().hex)[0], None
    own = folder / f".seen_{token}_{rank}"
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            own.touch()
        except OSError as error:
            fault = f"rank {rank} cannot write to {folder}: {error.strerror}"
        if fault := next(filter(None, gather(fault)), None):
            raise ConfigError(f"checkpoint.local_dir: {fault}; name a folder that can be written on every node")
        seen = sorted(int(file.name.rpartition("_")[2]) for file in folder.glob(f".seen_{token}_*"))
        found = gather(seen)
    finally:
        with contextlib.suppress(OSError):  # missing, or not empty
            own.unlink()
            for one in made:
                one.rmdir()
    return sorted({tuple(one): one for one in found}.values())


def targets(disks: Sequence[Sequence[int]]) -> dict[int, int]:
    """Returns, for each rank, the rank on the next disk that keeps a copy of its files; empty for a single disk."""
    if len(disks) < 2:
        return {}
    following = [*disks[1:], disks[0]]
    return {
        rank: there[index % len(there)]
        for here, there in zip(disks, following, strict=True)
        for index, rank in enumerate(here)
    }


def exchange(
    folder: Path, rank: int, files: Sequence[Facts], to: Mapping[int, int], group: dist.ProcessGroup
) -> str | None:
    """Sends this rank's files to rank `to[rank]`, and writes those of the ranks that send to it, all in `folder`.

    `files` has every rank's, in rank order, each with the same number of files. Returns what failed here, if anything:
    the exchange goes on, since others take part in it. Collective.
    """
    sources, fault = [one for one, target in to.items() if target == rank], None
    for index in range(len(files[rank])):
        name = sorted(files[rank])[index]
        incoming = {one: sorted(files[one])[index] for one in sources}
        fault = _exchange(folder, name, files[rank][name], to[rank], incoming, files, group) or fault
    return fault


def _exchange(
    folder: Path,
    name: str,
    facts: Mapping[str, Any],
    target: int,
    incoming: Mapping[int, str],
    files: Sequence[Facts],
    group: dist.ProcessGroup,
) -> str | None:
    sizes = {one: int(files[one][theirs]["bytes"]) for one, theirs in incoming.items()}
    with contextlib.ExitStack() as stack:
        receivers = {one: _ReceivedFile(folder / theirs, stack) for one, theirs in incoming.items()}
        source = _SentFile(folder / name, stack)
        for begin in range(0, max([int(facts["bytes"]), *sizes.values()]), BLOCK):
            waiting: list[Any] = []
            if (left := int(facts["bytes"]) - begin) > 0:
                waiting.append(dist.isend(source.read(min(left, BLOCK)), target, group=group))
            blocks = {}
            for one, size in sizes.items():
                if size > begin:
                    blocks[one] = torch.empty(min(size - begin, BLOCK), dtype=torch.uint8)
                    waiting.append(dist.irecv(blocks[one], one, group=group))
            for work in waiting:
                work.wait()
            for one, block in blocks.items():
                receivers[one].write(block)
        faults = [source.fault]
        for one, receiver in receivers.items():
            faults.append(receiver.end(files[one][incoming[one]]["sha256"]))
    return next(filter(None, faults), None)


class _SentFile:
    """File that is sent. If it cannot be read, zeros are sent, which its receiver finds by their SHA-256."""

    def __init__(self, file: Path, stack: contextlib.ExitStack):
        self.fault: str | None = None
        self._stream: BinaryIO | None = None
        try:
            self._stream = stack.enter_context(file.open("rb"))
        except OSError as error:
            self.fault = f"{file} cannot be read: {error.strerror}"

    def read(self, size: int) -> torch.Tensor:
        block = bytearray(size)
        try:
            if self._stream is not None:
                self._stream.readinto(block)  # type: ignore[attr-defined]
        except OSError as error:
            self.fault = f"{self._stream and self._stream.name} cannot be read: {error.strerror}"
        return torch.frombuffer(block, dtype=torch.uint8)


class _ReceivedFile:
    """File that is received. After a write that fails, the rest of it is dropped."""

    def __init__(self, file: Path, stack: contextlib.ExitStack):
        self._file, self._fault, self._digest = file, "", hashlib.sha256()
        self._stream: BinaryIO | None = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = stack.enter_context(file.open("wb"))
        except OSError as error:
            self._fail(error)

    def write(self, block: torch.Tensor) -> None:
        content = block.numpy().tobytes()
        self._digest.update(content)
        try:
            if self._stream is not None and not self._fault:
                self._stream.write(content)
        except OSError as error:
            self._fail(error)

    def end(self, sha256: str) -> str | None:
        """Flushes the file to disk; returns what has failed, if anything."""
        try:
            if self._stream is not None:
                self._stream.close()
                sync(self._file)
        except OSError as error:
            self._fail(error)
        if not self._fault and self._digest.hexdigest() != sha256:
            return f"{self._file} does not match its SHA-256 after it was sent"
        return self._fault or None

    def _fail(self, error: OSError) -> None:
        self._fault = self._fault or f"{self._file} cannot be written: {error.strerror}"
