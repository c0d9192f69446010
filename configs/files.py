"""Atomic writes of files and folders, and checksums of files."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_atomic(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path` whole or not at all: to a temporary file in the same folder, with fsync and rename.

    A device, a pipe and an open file (/dev/null, /dev/stdout) are written to as they are, since a rename would put a
    file in their place. An OSError names `path`, and neither the temporary file nor, as a write to a full disk does,
    nothing.
    """
    path = Path(path)
    if _is_open_or_special(path):
        with open(path, "wb") as file:
            file.write(content)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out`, which becomes `out` at the end; after an error nothing is left of it."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir(parents=True)
        yield partial
        sync(partial)
        partial.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_open_or_special(path: Path) -> bool:
    """Whether a path is a device, a pipe or a socket, or a link to a file that a process has open."""
    if path.is_symlink() and os.readlink(path).startswith("/proc/"):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def sync(path: str | Path) -> None:
    """Flushes a file's content, or a directory's entries, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
