"""Config section [run] of a data run: its folder, and the executor of its tasks (this machine, Slurm, Ray or MPI)."""

from typing import Literal

from pydantic import Field

from configs.section import Section
from configs.slurm import SlurmAccountConfig


class SlurmConfig(SlurmAccountConfig):
    """Resources of the array jobs of executor = "slurm". Up to `run.workers` elements of a job run at a time."""

    cpus_per_task: int = Field(default=1, ge=1)
    """The cores of one element."""
    mem_per_cpu_gb: int = Field(default=2, ge=1)
    """The memory of an element for each of its cores, in GiB."""
    tasks_per_job: int = Field(default=1, ge=1)
    """The number of tasks that one element executes, one after another."""
    max_array_size: int = Field(default=1001, ge=1)
    """The maximum number of elements of one job, not above MaxArraySize of slurm.conf."""
    setup: str = ""
    """Shell commands before a task's Python starts, such as "module load python"; empty for none."""


class RayConfig(Section):
    """The Ray cluster of executor = "ray", and the resources that each task reserves there."""

    address: str | None = None
    """The address of a running cluster, such as "auto"; left out, Ray starts on this machine, on loopback only."""
    cpus_per_task: int = Field(default=1, ge=1)
    """The cores that a task reserves."""
    mem_per_cpu_gb: float = Field(default=2, gt=0)
    """The memory that a task reserves for each of its cores, in GiB; Ray does not enforce it."""


class DataRunConfig(Section):
    """The run's folder, and the executor of its tasks. Neither `executor` nor `workers` changes the result."""

    dir: str = Field(min_length=1)
    """The folder that all stages write into, relative to the working directory."""
    executor: Literal["local", "slurm", "ray", "mpi"] | None = None
    """The executor of the tasks; left out, it is mpi under mpirun and local otherwise."""
    workers: int = Field(default=2, ge=1)
    """The number of tasks that run at a time; under mpi the number of ranks decides instead."""
    slurm: SlurmConfig = SlurmConfig()
    """Resources of the array jobs of executor = "slurm"."""
    ray: RayConfig = RayConfig()
    """The Ray cluster of executor = "ray"."""
    shard_bytes: int = Field(default=2_000_000, ge=1)
    """The size of a shard, the unit of work, in bytes of text; it decides how files are divided, workers does not."""
