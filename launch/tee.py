"""One command with its output on the screen, live, and in a log file.

On a terminal the command gets a terminal of its own (a pty of the same size), so that its progress bars move
as if it had been started by hand; elsewhere a pipe, and it prints plain lines. Unix only. Leaves out input:
the command has none.
"""

import contextlib
import fcntl
import os
import pty
import shutil
import signal
import struct
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from launch.processes import ProcessGroup

LAST_WORDS_SECONDS = 5.0  # how long output is still read after the command's end, should a child hold it open


class Ended(NamedTuple):
    """How a command ended: its exit status, 128 + n for signal n, and the first signal that came to us meanwhile, or 0.

    A command that has done its work by then ends with 0 all the same.
    """

    status: int
    signal: int


def run(command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, held_back: bool = False) -> Ended:
    """Runs `command`, appends its output to `log` and shows it. `held_back`: see ProcessGroup.start."""
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = sys.stdout.isatty()
    ours, theirs = pty.openpty() if terminal else os.pipe()
    previous = None
    try:
        with ProcessGroup() as group, open(log, "ab") as file:
            if terminal:
                _copy_size(ours)
                previous = signal.signal(signal.SIGWINCH, lambda _n, _f: _copy_size(ours))
            group.start(command, env, output=theirs, held_back=held_back)
            os.close(theirs)
            reader = threading.Thread(target=_copy, args=(ours, file), daemon=True)
            reader.start()
            status = group.wait()
            reader.join(LAST_WORDS_SECONDS)
        return Ended(status, group.signal)
    finally:
        if previous is not None:
            signal.signal(signal.SIGWINCH, previous)
        os.close(ours)


def _copy(source: int, log: BinaryIO) -> None:
    # A pty whose other end is closed answers EIO, a pipe end of file; a log or screen that is gone ends it
    # too.
    with contextlib.suppress(OSError, ValueError):
        while data := os.read(source, 65536):
            log.write(data)
            log.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def _copy_size(terminal: int) -> None:
    columns, lines = shutil.get_terminal_size()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
