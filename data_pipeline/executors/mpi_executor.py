"""The ranks of `mpirun -n N trivium data run CONFIG`: rank 0 plans, counts and publishes, all of them do tasks.

A stage goes to every rank as one message; who does which task is settled by claim files in the run directory, which
all ranks see: each takes its own share first and then what others have not begun. Waiting ranks sleep, since MPI's own
waiting keeps a core busy. MPI is loaded here and only when a run asks for it. Leaves out a lost rank: MPI then ends
all, and the next run goes on from the finished stages.
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
from data_pipeline.core.progress import Say
from data_pipeline.executors.base import Executor, PipelineJob
from data_pipeline.executors.local_executor import run_in_order
from data_pipeline.executors.tasks import Tasks, claim, quiet, ranks_in

_POLL_SECONDS = 0.01
_INTERRUPTED = 130


class MpiTasks(Tasks):
    """A pipeline with its tasks, to be sent to all ranks."""

    def __init__(self, job: PipelineJob) -> None:
        PipelineExecutor.__init__(self, list(job.steps), str(job.logs))
        self.tasks = job.tasks

    @property
    def world_size(self) -> int:
        return self.tasks

    def run(self) -> None:
        run_in_order(self)

    def run_share(self, rank: int, ranks: int) -> None:
        """Does tasks until none is left or one has failed, its own share first: rank, rank + ranks, ..."""
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
            except OSError:  # the disk is full, as the leading rank will find
                return
            if mine_now:
                with contextlib.suppress(Exception):  # it is on file
                    self.run_claimed(task)


class MpiExecutor(Executor):
    """`rank` of `world_size` is what the launcher said; MPI must say the same."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._world: Any = _load().COMM_WORLD
        self._rank, self.workers = self._world.Get_rank(), self._world.Get_size()
        self.leads = self._rank == 0
        self._busy = False  # from a stage's start until all know that it has ended
        if (self._rank, self.workers) != (rank, world_size):
            raise ConfigError(
                f"{world_size} ranks were started, but MPI sees {self.workers}: this mpirun or srun is not of the MPI "
                "library that mpi4py loaded; use the mpirun beside it (pip install mpich puts one into the environment)"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not KeyboardInterrupt and not self._busy:
            if self.leads:
                self._tell(None)
            return
        # The others wait for this rank, or are in the midst of tasks, and MPI ends in order only with all of them.
        if kind is KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        status = _INTERRUPTED if kind is KeyboardInterrupt else 1
        self._world.Abort(status)
        os._exit(status)  # some MPIs come back from it, and the end of the others is then all that is left to wait for

    def run(self, job: PipelineJob, say: Say) -> None:
        tasks = MpiTasks(job)
        if job.tasks == 1:
            run_in_order(tasks)
            return
        self._busy = True
        self._tell(dill.dumps(tasks))
        tasks.run_share(0, self.workers)
        for rank in range(1, self.workers):
            self._hear(rank)
        self._busy = False

    def serve(self) -> int:
        # Ctrl-C reaches all ranks; the first one speaks, and ends the others if mpirun has not.
        signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
        quiet(None)
        while (message := self._hear(0)) is not None:
            self._busy = True
            dill.loads(message).run_share(self._rank, self.workers)
            self._world.send(None, dest=0)
            self._busy = False
        return 0

    def _tell(self, message: bytes | None) -> None:
        for rank in range(1, self.workers):
            self._world.send(message, dest=rank)

    def _hear(self, rank: int) -> bytes | None:
        while not self._world.iprobe(source=rank):
            time.sleep(_POLL_SECONDS)
        return self._world.recv(source=rank)


def _load() -> Any:
    """mpi4py's MPI, initialised. Errors: ConfigError where there is no MPI library."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a launcher that is not this MPI's: told as an error later
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"run.executor = mpi needs an MPI library that mpi4py can load ({str(error).splitlines()[0]}); "
            "run: pip install -c constraints.txt mpich, or install the cluster's own"
        ) from None
    return MPI
