"""Where a data run lives, and who does its tasks: this machine, Slurm, Ray or MPI."""

import re
from typing import Literal

from pydantic import Field, field_validator

from configs.section import Section


class SlurmConfig(Section):
    """What the array jobs ask for under executor = "slurm". `run.workers` of a job's elements run at a time."""

    partition: str | None = None
    """The partition, as in sbatch --partition; left out, the cluster's default."""
    account: str | None = None
    """The account that is charged, as in sbatch --account; left out, the cluster's default."""
    qos: str | None = None
    """The quality of service, as in sbatch --qos; left out, the cluster's default."""
    time: str = "24:00:00"
    """The time limit of one element of a job, as sbatch takes it: HH:MM:SS or D-HH:MM:SS."""
    cpus_per_task: int = Field(default=1, ge=1)
    """The cores of one element."""
    mem_per_cpu_gb: int = Field(default=2, ge=1)
    """The memory of an element for each of its cores, in GiB."""
    tasks_per_job: int = Field(default=1, ge=1)
    """The number of tasks that one element works through, one after another."""
    max_array_size: int = Field(default=1001, ge=1)
    """The most elements of one job, not above MaxArraySize of slurm.conf."""
    setup: str = ""
    """Shell commands before a task's Python starts, such as "module load python"; empty for none."""

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, time: str) -> str:
        if not re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", time):
            raise ValueError(f'{time!r} is no time limit of sbatch; write hours as "24:00:00" or days as "2-12:00:00"')
        return time


class RayConfig(Section):
    """Which Ray does the tasks under executor = "ray", and what each of them books there."""

    address: str | None = None
    """The address of a running cluster, such as "auto"; left out, Ray starts on this machine, on loopback only."""
    cpus_per_task: int = Field(default=1, ge=1)
    """The cores that a task books."""
    mem_per_cpu_gb: float = Field(default=2, gt=0)
    """The memory that a task books for each of its cores, in GiB; Ray does not enforce it."""


class DataRunConfig(Section):
    """Where the run lives and who does its tasks. Neither `executor` nor `workers` changes a byte of the result."""

    dir: str
    """The folder that all stages write into, relative to the working directory."""
    executor: Literal["local", "slurm", "ray", "mpi"] | None = None
    """Who does the tasks; left out, mpi under mpirun and local otherwise."""
    workers: int = Field(default=2, ge=1)
    """The number of tasks at a time; under mpi it is the number of ranks instead."""
    slurm: SlurmConfig = SlurmConfig()
    """What the array jobs ask for under executor = "slurm"."""
    ray: RayConfig = RayConfig()
    """Which Ray does the tasks under executor = "ray"."""
    shard_bytes: int = Field(default=2_000_000, ge=1)
    """The bytes of text in a shard, the unit of work; the files' cut depends on it, and never on workers."""
