"""Shows the progress of a stage's tasks: each task writes a small file, and the parent process adds them up.

Files work wherever the tasks run. Only bytes of input are counted; counts of documents are the ledger's.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from data_pipeline.core.console import say

_TICK_SECONDS = 0.3
_LINE_SECONDS = 5.0
_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "bytes"))

SetNote = Callable[[str], None]  # sets the text shown beside the progress bar


class ProgressFile:
    """Small file in which one task writes how many bytes of input it has processed; the parent process reads it."""

    def __init__(self, folder: str | Path, rank: int) -> None:
        self._path = Path(folder) / f"{rank:05d}"
        self._done = 0
        self._last = 0.0

    def advance(self, size: int) -> None:
        """Adds `size` bytes; writes the file at most every 0.3 seconds."""
        self._done += size
        now = time.monotonic()
        if now - self._last >= _TICK_SECONDS:
            self._last = now
            self._path.write_text(str(self._done))

    def close(self) -> None:
        """Writes the final count."""
        self._path.write_text(str(self._done))


def _done(folder: Path) -> int:
    return sum(int(path.read_text() or 0) for path in folder.iterdir())


@contextlib.contextmanager
def watch(title: str, folder: Path, total: int, console: Console) -> Iterator[SetNote]:
    """Shows the sum of the progress files in `folder` during the block, as a bar on a terminal, else as lines.

    `total` is the expected sum in bytes, 0 if unknown. Yields a function that sets the text shown beside the bar, such
    as the state of a job queue.
    """
    stop = threading.Event()
    note = [""]
    target = _bar if console.is_terminal else _lines
    thread = threading.Thread(target=target, args=(title, folder, total, console, stop, note), daemon=True)
    thread.start()
    try:
        yield lambda text: note.__setitem__(0, text)
    finally:
        stop.set()
        thread.join()


def _bar(title: str, folder: Path, total: int, console: Console, stop: threading.Event, note: list[str]) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{title:<10}", total=total or None, note="")  # None: a pulsing bar
        while not stop.wait(0.25):
            progress.update(task, completed=min(_done(folder), total), note=note[0])


def _lines(title: str, folder: Path, total: int, console: Console, stop: threading.Event, note: list[str]) -> None:
    while not stop.wait(_LINE_SECONDS):
        beside = f"; {note[0]}" if note[0] else ""
        say(f"{title}: {_how_far(_done(folder), total)}{beside}", console)


def _how_far(done: int, total: int) -> str:
    """Formats "12.0 of 80.5 MB" in the unit that fits `total`; "at work" if `total` is 0, as it is unknown."""
    if total <= 0:
        return "at work"
    size, unit = next(((size, unit) for size, unit in _UNITS if total >= size), _UNITS[-1])
    digits = 1 if size > 1 else 0
    return f"{min(done, total) / size:,.{digits}f} of {total / size:,.{digits}f} {unit}"
