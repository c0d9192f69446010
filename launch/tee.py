"""Runs one command with its output shown live and written to a log file.

If stdout is a terminal, the command gets a pseudo-terminal of the same size, so that its progress bars work as if it
had been started by hand; otherwise it gets a pipe and prints plain lines. The command has no input. Unix only.
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

LAST_WORDS_SECONDS = 5.0  # how long output is read after the command's end, if a child process keeps it open


class Ended(NamedTuple):
    """A command's exit status (128 + n after death by signal n) and the first signal that this process got meanwhile.

    `signal` is 0 if there was none. `status` can be 0 in spite of a signal, if the command had finished its work.
    """

    status: int
    signal: int


def run(
    command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, signals_blocked: bool = False
) -> Ended:
    """Runs `command`, appends its output to `log` and shows it; `signals_blocked` is as in `ProcessGroup.start`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = sys.stdout.isatty()
    ours, theirs = pty.openpty() if terminal else os.pipe()
    previous = None
    try:
        with ProcessGroup() as group, open(log, "ab") as file:
            if terminal:
                _copy_size(ours)
                previous = signal.signal(signal.SIGWINCH, lambda _n, _f: _copy_size(ours))
            group.start(command, env, output=theirs, signals_blocked=signals_blocked)
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
    # The end of output is EIO on a pty and end of file on a pipe; a log or terminal that cannot be written ends it too.
    with contextlib.suppress(OSError, ValueError):
        while data := os.read(source, 65536):
            log.write(data)
            log.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def _copy_size(terminal: int) -> None:
    columns, lines = shutil.get_terminal_size()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
