"""Which executor a run gets: the one its config names, or, where it names none, what started this process decides."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from configs.data_run import DataRunConfig
from configs.loader import ConfigError
from data_pipeline.executors.base import Executor
from data_pipeline.executors.local_executor import LocalExecutor
from launch.environment import mpi_rank_and_world


def choose(run: DataRunConfig) -> Executor:
    """The executor of `run`, nothing started yet. Errors: ConfigError where it cannot work here."""
    rank, world_size = mpi_rank_and_world()
    name = run.executor or ("mpi" if world_size > 1 else "local")
    if name != "mpi" and world_size > 1:
        raise ConfigError(
            f"run.executor = {name} runs from one process, and {world_size} ranks were started; start one, without "
            "mpirun or srun, or take --executor mpi"
        )
    if name == "slurm":
        from data_pipeline.executors.slurm_executor import SlurmExecutor

        return SlurmExecutor(run.slurm, run.workers)
    if name == "ray":
        from data_pipeline.executors.ray_executor import RayExecutor

        return RayExecutor(run.ray, run.workers)
    if name == "mpi":
        from data_pipeline.executors.mpi_executor import MpiExecutor

        return MpiExecutor(rank, world_size)
    return LocalExecutor(run.workers)


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Of ranks that all find the same mistake in a command line or config, only the first tells it."""
    if mpi_rank_and_world()[0] == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere:
        try:
            with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
                yield
        except ConfigError:
            raise SystemExit(2) from None
