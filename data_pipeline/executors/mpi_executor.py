"""Runs tasks on the ranks of `mpirun -n N trivium data run CONFIG`; rank 0 also plans, counts and publishes.

Each stage's pipeline is sent to every rank as one message. Ranks claim tasks through files in the run directory, which
all of them see: each takes its own share first, and then tasks that others have not begun. Waiting ranks sleep, since
MPI's own waiting keeps a core busy. MPI is loaded here alone, and only if a run uses it. A lost rank is not replaced:
MPI then ends all ranks, and the next run continues from the finished stages.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import dill
from datatrove.executor.base import PipelineExecutor

from configs.loader import ConfigError
from data_pipeline.core.progress import SetNote
from data_pipeline.executors.base import Executor, PipelineJob
from data_pipeline.executors.local_executor import run_in_order
from data_pipeline.executors.stage_tasks import Tasks, claim, quiet, ranks_in

_POLL_SECONDS = 0.01
_INTERRUPTED = 130


class MpiTasks(Tasks):
    """A pipeline and its tasks, in the form that is sent to all ranks."""

    def __init__(self, job: PipelineJob) -> None:
        PipelineExecutor.__init__(self, list(job.steps), str(job.logs))
        self.tasks = job.tasks

    @property
    def world_size(self) -> int:
        return self.tasks

    def run(self) -> None:
        run_in_order(self)

    def run_share(self, rank: int, ranks: int) -> None:
        """Runs tasks until none is left or one has failed, this rank's own first: rank, rank + ranks, ..."""
        logs = Path(self.logging_dir.path)
        mine = range(rank, self.tasks, ranks)
        order = [*mine, *(task for task in range(self.tasks) if task not in mine)]
        while not ranks_in(logs / "failed"):
            started = ranks_in(logs / "started")
            task = next((task for task in order if task not in started), None)
            if task is None:
                return
            try:
                mine_now = claim(logs, task)
            except OSError:  # most likely a full disk, which the leading rank reports
                return
            if mine_now:
                with contextlib.suppress(Exception):  # run_claimed has written it to a file
                    self.run_claimed(task)


class MpiExecutor(Executor):
    """Runs tasks on all MPI ranks; rank 0 leads.

    `rank` and `world_size` come from the launcher's environment; raises ConfigError if MPI reports others.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._world: Any = _load().COMM_WORLD
        self._rank, self.workers = self._world.Get_rank(), self._world.Get_size()
        self.leads = self._rank == 0
        self._busy = False  # True while a stage's tasks run on all ranks
        if (self._rank, self.workers) != (rank, world_size):
            raise ConfigError(
                f"{world_size} ranks were started, but MPI sees {self.workers}: this mpirun or srun does not belong "
                "to the MPI library that mpi4py loaded; use that library's mpirun (pip install mpich puts one into the "
                "environment)"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not KeyboardInterrupt and not self._busy:
            if self.leads:
                self._send_to_all(None)
            return
        # Other ranks wait for this one or are running tasks, and MPI can only shut down when all ranks do so together.
        if kind is KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        status = _INTERRUPTED if kind is KeyboardInterrupt else 1
        self._world.Abort(status)
        os._exit(status)  # with some MPI libraries Abort returns

    def run(self, job: PipelineJob, set_note: SetNote) -> None:
        tasks = MpiTasks(job)
        if job.tasks == 1:
            run_in_order(tasks)
            return
        self._busy = True
        self._send_to_all(dill.dumps(tasks))
        tasks.run_share(0, self.workers)
        for rank in range(1, self.workers):
            self._receive(rank)
        self._busy = False

    def serve(self) -> int:
        # Ctrl-C reaches all ranks; rank 0 prints the message, and ends the others if mpirun has not.
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
        quiet(None)
        while (message := self._receive(0)) is not None:
            self._busy = True
            dill.loads(message).run_share(self._rank, self.workers)
            self._world.send(None, dest=0)
            self._busy = False
        return 0

    def _send_to_all(self, message: bytes | None) -> None:
        for rank in range(1, self.workers):
            self._world.send(message, dest=rank)

    def _receive(self, rank: int) -> bytes | None:
        """Waits for a message of a rank; sleeps in between, since MPI's own waiting keeps a core busy."""
        while not self._world.iprobe(source=rank):
            time.sleep(_POLL_SECONDS)
        return self._world.recv(source=rank)


def _load() -> Any:
    """Loads and initialises mpi4py's MPI. Raises ConfigError if there is no MPI library."""
    try:
        with warnings.catch_warnings(action="ignore"):  # MPI warns of what is an error below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"run.executor = mpi needs an MPI library that mpi4py can load ({str(error).splitlines()[0]}); "
            "run: pip install -c constraints.txt mpich, or put the folder of the cluster's own libmpi.so on "
            "LD_LIBRARY_PATH"
        ) from None
    return MPI
