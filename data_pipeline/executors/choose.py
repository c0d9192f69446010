"""Chooses a run's executor: the one in its config, else MPI if mpirun or srun started this process, else local."""

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
    """Returns the executor of `run`, without starting workers. Raises ConfigError if it cannot work here."""
    rank, world_size = mpi_rank_and_world()
    name = run.executor or ("mpi" if world_size > 1 else "local")
    if name != "mpi" and world_size > 1:
        raise ConfigError(
            f"run.executor = {name} runs from one process, and {world_size} ranks were started; start one, without "
            "mpirun or srun, or use --executor mpi"
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
def output_of_rank_0_only() -> Iterator[None]:
    """Silences ranks other than 0 inside the block, so that an error that all ranks find is printed once.

    A ConfigError ends such a rank with exit status 2.
    """
    if mpi_rank_and_world()[0] == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere:
        try:
            with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
                yield
        except ConfigError:
            raise SystemExit(2) from None
