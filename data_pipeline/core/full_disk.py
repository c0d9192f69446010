"""A disk that is full, or a folder that cannot be written to, told in one sentence wherever it is met.

A task on a full disk can leave neither a log nor its error. So whoever waits for it tries to write there as well.
"""

import contextlib
import errno
import os
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE_BYTES = 1 << 16  # more than what a task writes to say that it failed


def trouble(folder: Path) -> str:
    """A sentence about why nothing can be written to a folder; "" where something can."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return told(str(error), folder)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return ""


def told(message: str, folder: Path) -> str:
    """What an error's message means for the run that writes to `folder`; the message itself if that is not known."""
    if is_full(message):
        return (
            f"the disk of {folder} is full ({message}): make room there, or name a run.dir on another disk, and run "
            "the same command again; finished stages are kept"
        )
    if os.strerror(errno.EROFS) in message or os.strerror(errno.EACCES) in message:
        return f"{folder} cannot be written to ({message}): make it writable, or name another run.dir"
    return message


def is_full(message: str) -> bool:
    return any(os.strerror(number) in message for number in _FULL)
