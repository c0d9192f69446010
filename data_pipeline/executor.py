"""Running a datatrove pipeline on this machine, quietly and with progress.

`LocalExecutor` is datatrove's LocalPipelineExecutor with its log lines sent to files of the run directory.
Slurm and Ray executors of datatrove take the same pipelines; starting those is left out here.
"""

import contextlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import multiprocess
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Imported once by the fork server, so that the workers of every stage start with them already loaded.
_PRELOAD = [
    "data_pipeline.reading",
    "data_pipeline.extraction",
    "data_pipeline.language",
    "data_pipeline.scoring",
    "data_pipeline.dedup.signatures",
    "data_pipeline.heldout",
]
_TICK_SECONDS = 0.3
_LINE_SECONDS = 5.0


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's local executor; what its workers would print goes to `<logs>/task_N.out`."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        in_worker = multiprocess.parent_process() is not None
        if in_worker:  # Ctrl-C reaches the whole process group; the parent alone answers it
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        folder = Path(self.logging_dir.path)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with (
                (folder / f"task_{rank:05d}.out").open("w", encoding="utf-8") as out,
                contextlib.redirect_stderr(out),
            ):
                return super()._run_for_rank(rank, local_rank, node_rank)
        finally:
            quiet(None)  # datatrove has just put its handler back, on a file that is closed now


def quiet(path: Path | None) -> None:
    """Takes datatrove's logger off the terminal and, given a path, onto that file."""
    logger.remove()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.add(path, level="INFO")


def run_pipeline(
    pipeline: Sequence[PipelineStep],
    *,
    title: str,
    tasks: int,
    workers: int,
    logs: Path,
    total_bytes: int,
    console: Console,
) -> None:
    """Runs `pipeline` in `tasks` tasks, `workers` at a time; `logs` is emptied first. A task's error is raised.

    `total_bytes` is what the pipeline's readers will report through `ProgressFile`, for the bar alone.
    """
    shutil.rmtree(logs, ignore_errors=True)
    (logs / "progress").mkdir(parents=True)
    quiet(logs / "executor.log")
    workers = max(1, min(workers, tasks))
    if workers > 1:
        multiprocess.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    executor = LocalExecutor(
        pipeline=list(pipeline), tasks=tasks, workers=workers, logging_dir=str(logs), skip_completed=False
    )
    with watch(title, logs / "progress", total_bytes, console):
        executor.run()
    quiet(None)


class ProgressFile:
    """How far one task is, in bytes of input; a small file that the parent process reads."""

    def __init__(self, folder: str | Path, rank: int) -> None:
        self._path = Path(folder) / f"{rank:05d}"
        self._done = 0
        self._last = 0.0

    def advance(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if now - self._last >= _TICK_SECONDS:
            self._last = now
            self._path.write_text(str(self._done))

    def close(self) -> None:
        self._path.write_text(str(self._done))


def _done(folder: Path) -> int:
    return sum(int(path.read_text() or 0) for path in folder.iterdir())


@contextlib.contextmanager
def watch(title: str, folder: Path, total: int, console: Console) -> Iterator[None]:
    """Shows the sum of the progress files in `folder` during the block: a bar on a terminal, else lines."""
    stop = threading.Event()
    target = _bar if console.is_terminal else _lines
    thread = threading.Thread(target=target, args=(title, folder, max(total, 1), console, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _bar(title: str, folder: Path, total: int, console: Console, stop: threading.Event) -> None:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{title:<10}", total=total)
        while not stop.wait(0.25):
            progress.update(task, completed=min(_done(folder), total))


def _lines(title: str, folder: Path, total: int, console: Console, stop: threading.Event) -> None:
    while not stop.wait(_LINE_SECONDS):
        done = min(_done(folder), total)
        console.print(f"{title}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", highlight=False)
