"""Section of what any job needs to enter a Slurm queue; data stages and launched commands add keys of their own."""

import re

from pydantic import Field, field_validator

from configs.section import Section


class SlurmAccountConfig(Section):
    """The queue that a job enters, who pays for it, and how long it may take."""

    partition: str | None = None
    """The partition, as in sbatch --partition; left out, the cluster's default."""
    account: str | None = None
    """The account that is charged, as in sbatch --account; left out, the cluster's default."""
    qos: str | None = None
    """The quality of service, as in sbatch --qos; left out, the cluster's default."""
    time: str = "24:00:00"
    """The time limit of one job or array element, as sbatch takes it: HH:MM:SS or D-HH:MM:SS."""

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, time: str) -> str:
        if not re.fullmatch(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", time):
            raise ValueError(f'{time!r} is no time limit of sbatch; write hours as "24:00:00" or days as "2-12:00:00"')
        return time


class SlurmJobConfig(SlurmAccountConfig):
    """Resources of the job of `trivium launch --on slurm`, and how it goes on after its time limit."""

    gpus_per_node: int = Field(default=0, ge=0)
    """The GPUs of each node, as in sbatch --gpus-per-node; 0 asks for none."""
    cpus_per_node: int | None = Field(default=None, ge=1)
    """The cores of each node; left out, the cluster's default, which is one core unless options have --exclusive."""
    warn_seconds: int = Field(default=300, ge=0, le=65535)
    """The seconds before the time limit at which ranks are told to save; Slurm may be a minute early."""
    most_requeues: int = Field(default=1000, ge=0)
    """The number of times that a job is put back into the queue before it ends for good."""
    check_nodes: bool = True
    """Whether `trivium doctor` looks at each node before the command starts there."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, one an entry, such as "--exclusive", "--mem=0" or "--constraint=h100"."""

    @field_validator("options")
    @classmethod
    def _are_long_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            name = option.partition("=")[0]
            if not re.fullmatch(r"--[a-z][a-z-]+(=.+)?", option):
                raise ValueError(f'{option!r} is no long option of sbatch; write it in one, like "--constraint=h100"')
            if name in OWN_OPTIONS:
                raise ValueError(f"{option!r} sets what the launcher sets itself; {OWN_OPTIONS[name]}")
        return options


_LEAVE = "leave it out"
# Options that every rendered script has, and the key that sets each.
OWN_OPTIONS = {
    "--nodes": "set nnodes",
    "--ntasks": "set nproc_per_node",
    "--ntasks-per-node": "set nproc_per_node",
    "--gpus-per-node": "set slurm.gpus_per_node",
    "--cpus-per-task": "set slurm.cpus_per_node",
    "--partition": "set slurm.partition",
    "--account": "set slurm.account",
    "--qos": "set slurm.qos",
    "--time": "set slurm.time",
    "--signal": "set slurm.warn_seconds",
    "--dependency": "give --after JOB",
    "--export": "set environment",
    **dict.fromkeys(("--requeue", "--no-requeue", "--open-mode", "--output", "--error"), _LEAVE),
    **dict.fromkeys(("--chdir", "--job-name", "--kill-on-invalid-dep", "--array", "--wrap"), _LEAVE),
}
