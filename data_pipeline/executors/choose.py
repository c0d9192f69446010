"""Chooses a run's executor: the one in its config, else MPI if mpirun or srun started this process, else local."""

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
