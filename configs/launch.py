"""Config of `trivium launch`: the nodes, the ranks on each, and what every way of starting them has to know.

Files are in configs/launch/. It has names of environment variables and never their values.
"""

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from configs.section import Section
from configs.slurm import SlurmJobConfig

ALWAYS_PASSED = ("HOME", "LANG", "PATH", "USER")


class LaunchConfig(Section):
    """The root of a launch config: a cluster as `trivium launch` sees it."""

    nnodes: int | None = Field(default=None, ge=1)
    """The number of machines; left out, one for each of hosts, or 1."""
    nproc_per_node: int = Field(default=1, ge=1)
    """The number of ranks on each machine: one for each of its GPUs."""
    min_nodes: int | None = Field(default=None, ge=1)
    """The fewest machines that `train` goes on with, in the nearest legal layout at the same global batch; left out, it
    takes all, and a lost machine is waited for."""
    hosts: tuple[str, ...] = ()
    """The machines that torchrun is started on over ssh, or mpirun, the first of which ranks meet at; not for Slurm."""
    port: int = Field(default=29500, ge=1, le=65535)
    """The port on the first of hosts where torchrun's ranks meet."""
    max_restarts: int = Field(default=0, ge=0)
    """The number of times that torchrun starts ranks again by itself."""
    python: str = ""
    """The Python of the nodes, such as .venv/bin/python; left out, the one that runs the command."""
    wrapper: tuple[str, ...] = ()
    """The words before the Python on each node, such as ["apptainer", "exec", "--nv", "/images/trivium.sif"]."""
    setup: str = ""
    """The file of shell commands, such as "module load cuda", that a Slurm job reads before all else."""
    environment: tuple[str, ...] = ()
    """The names of environment variables to pass on beside HOME, LANG, PATH and USER; no other reaches the nodes."""
    ssh: tuple[str, ...] = ("ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15")
    """The words of the ssh command, before the host."""
    mpirun: tuple[str, ...] = ("mpirun",)
    """The words of MPICH's or Open MPI's mpirun, before the options that the launcher gives it."""
    slurm: SlurmJobConfig = SlurmJobConfig()
    """The job of `--on slurm`."""

    @field_validator("environment")
    @classmethod
    def _are_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                shown = name.partition("=")[0]  # never the value, which may be a secret
                raise ValueError(
                    f"{shown!r} is not the name of an environment variable alone; write the name, and set its value in "
                    "the shell that launches"
                )
        return names

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not re.fullmatch(r"[A-Za-z0-9_]([\w.:@-]*\w)?", host, re.ASCII):
                raise ValueError(f"{host!r} is no host; write a name or an address, such as gpu0 or 10.0.0.1")
        return hosts

    @field_validator("ssh", "mpirun")
    @classmethod
    def _has_a_program(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if not words:
            raise ValueError('[] names no program; write the words of a command, such as ["ssh", "-p", "2222"]')
        return words

    @model_validator(mode="after")
    def _has_no_control_characters(self) -> "LaunchConfig":
        """Refuses line breaks, which would end a line of a script, anywhere in the config."""
        for key, text in _texts(self.model_dump(), ""):
            if not text.isprintable():
                raise ValueError(f"{key} = {text!r} has a line break or another control character; take it out")
        return self

    @model_validator(mode="after")
    def _hosts_are_the_nodes(self) -> "LaunchConfig":
        if self.hosts and self.nnodes not in (None, len(self.hosts)):
            raise ValueError(f"nnodes = {self.nnodes}, and hosts names {len(self.hosts)} machines; leave nnodes out")
        if self.min_nodes and (self.nnodes or self.hosts) and self.min_nodes > self.nodes:
            raise ValueError(
                f"min_nodes = {self.min_nodes} is more than the {self.nodes} machines that there are; set min_nodes="
                f"{self.nodes} or less"
            )
        return self

    @property
    def nodes(self) -> int:
        """The number of machines."""
        return self.nnodes or len(self.hosts) or 1

    @property
    def world_size(self) -> int:
        """The number of ranks in all."""
        return self.nodes * self.nproc_per_node

    @property
    def passed(self) -> tuple[str, ...]:
        """The names of all environment variables that reach the nodes."""
        return tuple(dict.fromkeys((*ALWAYS_PASSED, *self.environment)))


def _texts(value: Any, key: str) -> list[tuple[str, str]]:
    """Returns (key, text) of every text in a plain tree."""
    if isinstance(value, str):
        return [(key, value)]
    if isinstance(value, dict):
        return [found for name, one in value.items() for found in _texts(one, f"{key}.{name}".lstrip("."))]
    if isinstance(value, list | tuple):
        return [found for one in value for found in _texts(one, key)]
    return []
