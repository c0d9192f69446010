"""What runs in one task, the same in a worker process, a Slurm job, a Ray actor and an MPI rank.

Files of the stage's log folder say how it went, since they are all that these have in common: `started/N` is made
before a task begins and names its process, `completions/N` when it is done, `failed/N.json` when it raised;
`task_N.log` holds its log and traceback. A task is started once: a scheduler that repeats it, after a node was lost
say, gets an error instead of lines written twice. Leaves out who starts tasks.
"""

import contextlib
import json
import os
import socket
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import IO

from datatrove.executor.base import DistributedEnvVars, PipelineExecutor
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats

from configs.files import write_atomic
from data_pipeline.core.full_disk import is_full, told, trouble

_FOLDERS = ("started", "completions", "failed", "progress", "stats")
_MESSAGE_CHARS = 2000
_SENTENCES = ("ValueError", "ConfigError", "TaskError", "DamagedData")  # whose messages need no name before them


class TaskError(RuntimeError):
    """A task of a stage failed or was lost: one sentence with stage, rank, reason and log."""


class Tasks(PipelineExecutor):
    """The part of datatrove's executors that runs one task, without what is wrong with it here.

    datatrove's logs to the terminal, and its tracebacks show the values of local variables: documents.
    """

    def run_claimed(self, rank: int) -> PipelineStats:
        """Runs a task that this process has claimed. Errors: whatever a step raises, once it is on file."""
        logs = Path(self.logging_dir.path)
        with _LOG.of_task(logs / log_name(rank)):
            pipeline = deepcopy(self.pipeline)  # the next task of this process starts afresh
            try:
                data = None
                for step in pipeline:
                    data = step(data, rank, self.world_size)
                deque(data or (), maxlen=0)
                stats = PipelineStats(pipeline)
                with (logs / "stats" / f"{rank:05d}.json").open("w", encoding="utf-8") as file:
                    stats.save_to_disk(file)
            except Exception as error:
                with contextlib.suppress(OSError):  # on a full disk; `check` finds out then
                    traceback.print_exc()
                with contextlib.suppress(OSError):
                    _record_failure(logs, rank, error)
                raise
        self.mark_rank_as_completed(rank)
        return stats

    def run_once(self, rank: int) -> PipelineStats:
        """Runs a task unless it was started before, which is an error. Errors: those of `run_claimed`, TaskError."""
        logs = Path(self.logging_dir.path)
        if not claim(logs, rank):
            first = (logs / "started" / f"{rank:05d}").read_text(encoding="utf-8")
            error = TaskError(f"it was started a second time, so {first} was lost, with its node perhaps")
            _record_failure(logs, rank, error)
            raise error
        return self.run_claimed(rank)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        return self.run_once(rank)  # this is what datatrove calls

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        raise NotImplementedError("for steps that start servers on several nodes; there are none here")


def prepare(logs: Path) -> None:
    """Makes the folders of a stage's log folder, so that no task has to."""
    for name in _FOLDERS:
        (logs / name).mkdir(parents=True)


def claim(logs: Path, rank: int) -> bool:
    """True for the one caller, of all processes that see `logs`, who is to run this task."""
    try:
        with (logs / "started" / f"{rank:05d}").open("x", encoding="utf-8") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
    except FileExistsError:
        return False
    return True


def ranks_in(folder: Path) -> set[int]:
    """The ranks that have a file in one of a stage's log folders."""
    return {int(name[:5]) for name in os.listdir(folder) if name[:5].isdecimal()}


def log_name(rank: int) -> str:
    return f"task_{rank:05d}.log"


def check(title: str, tasks: int, logs: Path) -> None:
    """Errors: TaskError for the first task that failed, or that is neither done nor failed."""
    failed = sorted(ranks_in(logs / "failed"))
    if failed:
        rank = failed[0]
        entry = json.loads((logs / "failed" / f"{rank:05d}.json").read_text(encoding="utf-8"))
        others = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
        kind = "" if entry["type"] in _SENTENCES else f"{entry['type']}: "
        message = told(entry["message"], logs.parent.parent) if is_full(entry["message"]) else entry["message"]
        raise lost(title, rank, tasks, logs, f"{kind}{message}{others}")
    unfinished = sorted(set(range(tasks)) - ranks_in(logs / "completions"))
    if unfinished:
        raise lost(title, unfinished[0], tasks, logs, f"it did not finish ({len(unfinished)} tasks did not)")


def lost(title: str, rank: int, tasks: int, logs: Path, reason: str) -> TaskError:
    """`reason` counts for less than a disk that is full: then a task can say nothing of what became of it."""
    reason = trouble(logs) or reason
    return TaskError(f"stage {title}, task {rank} of {tasks}: {reason}; its log: {logs / log_name(rank)}")


def quiet(path: Path | None) -> None:
    """Takes datatrove's logger off the terminal and, given a path, onto that file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    _LOG.leads_to(path)


class _Log:
    """The one sink of loguru in a process, whatever it leads to now.

    Each sink that loguru is given takes it some 40 ms of CPU, spent on where Python's libraries lie: more than what
    a short task takes.
    """

    def __init__(self) -> None:
        self._added = False
        self._path: Path | None = None
        self._file: IO[str] | None = None

    def leads_to(self, path: Path | None) -> None:
        """Lines outside a task go to `path` from here on, or nowhere."""
        if not self._added:
            logger.remove()  # the terminal
            logger.add(self._write, level="DEBUG", diagnose=False)
            self._added = True
        self._path = path

    @contextlib.contextmanager
    def of_task(self, path: Path) -> Iterator[None]:
        """What the block logs or prints to stderr goes to `path`."""
        self.leads_to(self._path)
        with path.open("w", encoding="utf-8") as file, contextlib.redirect_stderr(file):
            self._file = file
            try:
                yield
            finally:
                self._file = None
                sys.stderr.flush()

    def _write(self, line: str) -> None:
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        elif self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)


_LOG = _Log()


def _record_failure(logs: Path, rank: int, error: Exception) -> None:
    entry = {"type": type(error).__name__, "message": str(error)[:_MESSAGE_CHARS]}
    write_atomic(logs / "failed" / f"{rank:05d}.json", json.dumps(entry).encode())
