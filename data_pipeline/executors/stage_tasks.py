"""Runs one task, in the same way in a worker process, a Slurm job, a Ray actor and an MPI rank.

A task reports through files in the stage's log folder, which all of these can write: `started/N` is created before it
begins and names its process, `completions/N` when it is done, `failed/N.json` when it raised an error; `task_N.log`
holds its log and traceback. A task is started once: if a scheduler repeats it, as after the loss of a node, that is an
error, since its output would be written twice.
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
from data_pipeline.core.full_disk import explain_write_error, is_full, write_problem

_FOLDERS = ("started", "completions", "failed", "progress", "stats")
_MESSAGE_CHARS = 2000
_SENTENCES = ("ValueError", "ConfigError", "TaskError", "DamagedData")  # errors shown without the name of their class


class TaskError(RuntimeError):
    """Raised if a task of a stage failed or was lost; its message names stage, rank, reason and log in one sentence."""


class Tasks(PipelineExecutor):
    """Replaces the part of datatrove's executors that runs one task.

    datatrove's own logs to the terminal, and its tracebacks show the values of local variables, among them documents.
    """

    def run_claimed(self, rank: int) -> PipelineStats:
        """Runs a task that this process has claimed. Raises what a step raises, after writing it to `failed/N.json`."""
        logs = Path(self.logging_dir.path)
        with _LOG.redirect_task(logs / log_name(rank)):
            pipeline = deepcopy(self.pipeline)  # steps keep state; the next task of this process starts with a new copy
            try:
                data = None
                for step in pipeline:
                    data = step(data, rank, self.world_size)
                deque(data or (), maxlen=0)
                stats = PipelineStats(pipeline)
                with (logs / "stats" / f"{rank:05d}.json").open("w", encoding="utf-8") as file:
                    stats.save_to_disk(file)
            except Exception as error:
                with contextlib.suppress(OSError):  # the disk may be full; `check` reports that
                    traceback.print_exc()
                with contextlib.suppress(OSError):
                    _record_failure(logs, rank, error)
                raise
        self.mark_rank_as_completed(rank)
        return stats

    def run_once(self, rank: int) -> PipelineStats:
        """Claims and runs a task. Raises what `run_claimed` raises, and TaskError if it was started before."""
        logs = Path(self.logging_dir.path)
        if not claim(logs, rank):
            first = (logs / "started" / f"{rank:05d}").read_text(encoding="utf-8")
            error = TaskError(f"it was started a second time, so {first} was lost, perhaps with its node")
            _record_failure(logs, rank, error)
            raise error
        return self.run_claimed(rank)

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        return self.run_once(rank)  # datatrove calls this method

    def get_distributed_env(self, node_rank: int = -1) -> DistributedEnvVars:
        """Tells datatrove's steps that a task has one machine, its own; -1 leaves a number to the machine."""
        return DistributedEnvVars(
            datatrove_node_ips="localhost",
            datatrove_cpus_per_task="-1",
            datatrove_mem_per_cpu="-1",
            datatrove_gpus_on_node="-1",
            datatrove_executor="LOCAL",
        )


def prepare(logs: Path) -> None:
    """Creates the subfolders of a stage's log folder before any task runs."""
    for name in _FOLDERS:
        (logs / name).mkdir(parents=True)


def claim(logs: Path, rank: int) -> bool:
    """Claims a task by creating `started/N`; True for the first caller among all processes that share `logs`."""
    try:
        with (logs / "started" / f"{rank:05d}").open("x", encoding="utf-8") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
    except FileExistsError:
        return False
    return True


def ranks_in(folder: Path) -> set[int]:
    """Ranks of the tasks that have a file in a folder such as `started` or `failed`."""
    return {int(name[:5]) for name in os.listdir(folder) if name[:5].isdecimal()}


def log_name(rank: int) -> str:
    """Name of a task's log file in the stage's log folder."""
    return f"task_{rank:05d}.log"


def check(title: str, tasks: int, logs: Path) -> None:
    """Raises TaskError for the first task that failed, or that is neither done nor failed."""
    failed = sorted(ranks_in(logs / "failed"))
    if failed:
        rank = failed[0]
        entry = json.loads((logs / "failed" / f"{rank:05d}.json").read_text(encoding="utf-8"))
        others = f" ({len(failed) - 1} more failed)" if len(failed) > 1 else ""
        kind = "" if entry["type"] in _SENTENCES else f"{entry['type']}: "
        message = entry["message"]
        if is_full(message):
            message = explain_write_error(message, logs.parent.parent)
        raise lost(title, rank, tasks, logs, f"{kind}{message}{others}")
    unfinished = sorted(set(range(tasks)) - ranks_in(logs / "completions"))
    if unfinished:
        raise lost(title, unfinished[0], tasks, logs, f"it did not finish ({len(unfinished)} tasks did not)")


def lost(title: str, rank: int, tasks: int, logs: Path, reason: str) -> TaskError:
    """Makes the error for a failed or lost task; a full disk, if that is found now, is given as the reason instead."""
    reason = write_problem(logs) or reason
    return TaskError(f"stage {title}, task {rank} of {tasks}: {reason}; its log: {logs / log_name(rank)}")


def quiet(path: Path | None) -> None:
    """Stops datatrove's logger from printing to the terminal; given a path, it writes to that file instead."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    _LOG.redirect(path)


class _Log:
    """The only loguru sink of a process; the file that it writes to changes.

    Adding a sink takes loguru some 40 ms of CPU, in which it looks up where Python's libraries are: more than a short
    task takes.
    """

    def __init__(self) -> None:
        self._added = False
        self._path: Path | None = None
        self._file: IO[str] | None = None

    def redirect(self, path: Path | None) -> None:
        """Writes what is logged outside of tasks to `path` from now on, or discards it."""
        if not self._added:
            logger.remove()  # the terminal
            logger.add(self._write, level="DEBUG", diagnose=False)
            self._added = True
        self._path = path

    @contextlib.contextmanager
    def redirect_task(self, path: Path) -> Iterator[None]:
        """Writes what is logged or printed to stderr inside the block to `path`."""
        self.redirect(self._path)
        with path.open("w", encoding="utf-8") as file, contextlib.redirect_stderr(file):
            self._file = file
            try:
                yield
            finally:
                self._file = None
                sys.stderr.flush()

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # as on a full disk, which what the task itself writes will say
            if self._file is not None:
                self._file.write(line)
                self._file.flush()
            elif self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)


_LOG = _Log()


def _record_failure(logs: Path, rank: int, error: Exception) -> None:
    """Writes the error's class and message to `failed/N.json`."""
    entry = {"type": type(error).__name__, "message": str(error)[:_MESSAGE_CHARS]}
    write_atomic(logs / "failed" / f"{rank:05d}.json", json.dumps(entry).encode())
