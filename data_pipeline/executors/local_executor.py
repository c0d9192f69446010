"""Runs tasks in worker processes on this machine, which are started once for the whole run.

datatrove's own local executor starts a manager, a fork server and a pool for every pipeline, which slows short stages,
and waits forever for a worker that the kernel killed. Here a worker's death is an error, and workers end when the
process that started them ends, even if it is killed. With one worker, tasks run in this process itself. Lost workers
are not restarted.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, cast

import dill
from datatrove.executor.local import LocalPipelineExecutor

from data_pipeline.core.progress import SetNote
from data_pipeline.executors.base import Executor, PipelineJob
from data_pipeline.executors.stage_tasks import TaskError, Tasks, lost, quiet, ranks_in

# Forked workers have everything imported already. The parent has one thread when it forks, so no lock is copied in a
# locked state. On other systems than Linux, forking is not safe with system libraries.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


class LocalTasks(Tasks, LocalPipelineExecutor):
    """A pipeline and its tasks, in the form that is sent to the worker processes."""


class LocalExecutor(Executor):
    """Runs tasks in `workers` processes of this machine, or in this process if there is one worker."""

    def __init__(self, workers: int, start_method: str = START_METHOD) -> None:
        self.workers = workers
        self._context: Any = multiprocessing.get_context(start_method)
        self._crew: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> "LocalExecutor":
        for number in range(self.workers if self.workers > 1 else 0):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs,), name=f"worker {number}", daemon=True)
            process.start()
            theirs.close()
            self._crew[ours] = process
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._crew.values():
            process.kill()  # it is idle, or runs a task whose result is no longer needed
        for connection, process in self._crew.items():
            process.join()
            connection.close()
        self._crew.clear()

    def run(self, job: PipelineJob, set_note: SetNote) -> None:
        tasks = LocalTasks(list(job.steps), tasks=job.tasks, workers=self.workers, logging_dir=str(job.logs))
        if self._crew:
            self._distribute(job, dill.dumps(tasks))
        else:
            run_in_order(tasks)

    def _distribute(self, job: PipelineJob, pipeline: bytes) -> None:
        """Keeps every worker busy until the tasks are done or one fails."""
        waiting = iter(range(job.tasks))
        busy: dict[Connection, int] = {}
        for connection, rank in zip(self._crew, waiting, strict=False):
            connection.send((pipeline, rank))
            busy[connection] = rank
        while busy:
            for connection in cast(list[Connection], wait(list(busy))):
                try:
                    connection.recv()
                except (EOFError, ConnectionResetError):
                    raise self._worker_died(job, busy[connection], self._crew[connection]) from None
                del busy[connection]
                if ranks_in(job.logs / "failed"):
                    return
                for rank in itertools.islice(waiting, 1):
                    connection.send((None, rank))
                    busy[connection] = rank

    def _worker_died(self, job: PipelineJob, rank: int, process: BaseProcess) -> TaskError:
        """Makes the error for a task whose worker process died."""
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        hint = " (the kernel does that when memory runs out: lower run.workers)" if code == -signal.SIGKILL else ""
        return lost(job.title, rank, job.tasks, job.logs, f"its process {how}{hint}")


def run_in_order(tasks: Tasks) -> None:
    """Runs all tasks in this process, up to the first that fails."""
    for rank in range(tasks.world_size):
        try:
            tasks.run_once(rank)
        except Exception:
            return  # run_once has written the error to a file


def _work(connection: Connection) -> None:
    """Main loop of a worker: receives a pipeline and ranks, and sends each rank back when its task has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet(None)
    tasks: LocalTasks | None = None
    while True:
        pipeline, rank = connection.recv()
        tasks = dill.loads(pipeline) if pipeline else tasks
        assert tasks is not None
        with contextlib.suppress(Exception):  # run_once has written it to a file
            tasks.run_once(rank)
        connection.send(rank)


def _end_with_parent() -> None:
    """Waits for the parent process to end, then ends this one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
