"""Explains in one sentence that a disk is full or that a folder cannot be written to.

A task on a full disk can write neither a log nor an error file. So the process that waits for the task tests with
`write_problem` whether the folder can still be written to.
"""

import contextlib
import errno
import os
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE_BYTES = 1 << 16  # more than a failing task needs for its error file


def write_problem(folder: Path) -> str:
    """Writes and removes a small file in `folder`; returns a sentence on why that failed, or "" if it worked."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return explain_write_error(str(error), folder)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return ""


def explain_write_error(message: str, folder: Path) -> str:
    """Rewrites the message of a write error so that it says what to do; returns any other message unchanged."""
    if is_full(message):
        return (
            f"the disk of {folder} is full ({message}): make room there, or name a run.dir on another disk, and run "
            "the same command again; finished stages are kept"
        )
    if os.strerror(errno.EROFS) in message or os.strerror(errno.EACCES) in message:
        return f"{folder} cannot be written to ({message}): make it writable, or name another run.dir"
    return message


def is_full(message: str) -> bool:
    """Whether an error's message says that a disk or a disk quota is full."""
    return any(os.strerror(number) in message for number in _FULL)
