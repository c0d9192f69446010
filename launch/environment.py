"""Rank, world size and rendezvous of this process, from its launcher's environment variables.

torchrun, Slurm's srun and MPI's mpirun each use variables of their own; `ClusterEnvironment.read` turns them into one
dataclass, and no other file reads them. Starting ranks is in launch/ranks.py, process groups are in pretrain. Imports
no torch, so that it also runs on a login node.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

DEFAULT_PORT = 29500
# Slurm numbers real steps from 0 and keeps the top of 32 bits for batch scripts and interactive shells.
_FIRST_RESERVED_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class ClusterEnvironment:
    """One process's rank among all ranks, as its launcher set it.

    `launcher` is torchrun, openmpi, mpich, slurm, or, for a process without a launcher, single (world size 1).
    `local_rank` counts within the node. `master_address` and `master_port` are where
    rank 0 listens for the rendezvous.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    master_address: str
    master_port: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes shared files."""
        return self.rank == 0

    @property
    def init_method(self) -> str:
        """The rendezvous as `init_method` of torch.distributed."""
        return f"tcp://{self.master_address}:{self.master_port}"

    @property
    def is_one_machine(self) -> bool:
        return self.local_world_size == self.world_size

    @property
    def opens_loopback(self) -> bool:
        """Whether this rank opens the port where ranks meet, and on loopback; torchrun opens one for its ranks."""
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return self.rank == 0 and not by_agent and is_loopback(self.master_address)

    def as_variables(self) -> dict[str, str]:
        """The variables that torchrun would set for this rank, to start a process with."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node_rank),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }

    def as_dict(self) -> dict[str, str | int]:
        """The fields as a dict for env.json, which gets no other part of the environment.

        A process without a launcher meets no other, and so has no address and no port.
        """
        return {
            name: value for name, value in asdict(self).items() if self.launcher != "single" or "master" not in name
        }

    @classmethod
    def read(cls, env: Mapping[str, str] | None = None) -> "ClusterEnvironment":
        """Reads `env` (default: os.environ). Raises ValueError naming the variable that is missing or wrong."""
        env = os.environ if env is None else env
        launcher, names = _launcher(env)
        if launcher == "slurm":
            return cls._slurm(env)
        if launcher == "single":
            return cls("single", 0, 1, 0, 1, 0, env.get("MASTER_ADDR", "127.0.0.1"), _port(env))
        rank, world_size = _rank_of(env, names[0], names[1])
        local_rank = _integer(env, names[2], default=rank)
        local_world_size = _integer(env, names[3], default=world_size, least=1)
        node_rank = _integer(env, "GROUP_RANK", default=rank // local_world_size)
        address = _master_address(env, launcher, local_world_size == world_size)
        return cls(launcher, rank, world_size, local_rank, local_world_size, node_rank, address, _port(env))

    @classmethod
    def _slurm(cls, env: Mapping[str, str]) -> "ClusterEnvironment":
        rank, world_size = _rank_of(env, *_launcher(env)[1])
        local_rank = _integer(env, "SLURM_LOCALID")
        node_rank = _integer(env, "SLURM_NODEID")
        per_node = expand_counts(env.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
        if node_rank >= len(per_node):
            raise ValueError(
                f"SLURM_NODEID={node_rank} is beyond SLURM_STEP_TASKS_PER_NODE's {len(per_node)} nodes; "
                "both are srun's: unset what was set by hand and start again"
            )
        nodes = env.get("SLURM_STEP_NODELIST", "")
        address = env.get("MASTER_ADDR") or (first_host(nodes) if nodes and len(per_node) > 1 else None)
        address = address or _master_address(env, "slurm", len(per_node) == 1)
        port = _port(env, default=20000 + _integer(env, "SLURM_JOB_ID") % 10000)
        return cls("slurm", rank, world_size, local_rank, per_node[node_rank], node_rank, address, port)


def is_loopback(address: str) -> bool:
    """Whether only processes of the same machine can reach an address."""
    return address in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", address) is not None


def is_main() -> bool:
    """Whether this process is rank 0; also True if the variables are wrong, which `ClusterEnvironment.read` reports."""
    try:
        return ClusterEnvironment.read().is_main
    except ValueError:
        return True


def was_launched() -> bool:
    """Whether a launcher started this process as one of its ranks."""
    return _launcher(os.environ)[0] != "single"


def report_to_torchrun(sentence: str) -> None:
    """Writes why this rank failed to torchrun's error file, so that torchrun's own report ends with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}), encoding="utf-8")


def mpi_rank_and_world(env: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Returns (rank, world size) as mpirun or srun set them; (0, 1) if neither started this process.

    MPI makes its own connections, so no rendezvous address is needed, and torchrun's variables, which a container may
    set for everything that runs in it, are ignored. Raises ValueError naming the variable that is missing or wrong.
    """
    env = os.environ if env is None else env
    launcher, names = _launcher({name: value for name, value in env.items() if name != "RANK"})
    return (0, 1) if launcher == "single" else _rank_of(env, names[0], names[1])


def _launcher(env: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Name of the launcher and of its variables for rank, world size, local rank and local world size."""
    # The innermost launcher comes first, since ranks inherit the variables of the outer ones: torchrun may run under
    # srun or mpirun, and mpirun starts its daemons through srun.
    if "RANK" in env:
        return "torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "OMPI_COMM_WORLD_RANK" in env:
        return "openmpi", tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    if "PMI_RANK" in env and "MPI_LOCALRANKID" in env:
        return "mpich", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    if _in_slurm_step(env):
        return "slurm", ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    return "single", ()


def expand_counts(text: str) -> list[int]:
    """Expands Slurm's tasks per node to one number a node: `4(x2),3` -> [4, 4, 3]. Raises ValueError if malformed."""
    counts: list[int] = []
    for entry in text.split(","):
        tasks, _, repeat = entry.strip().partition("(x")
        times = repeat.removesuffix(")") or "1"
        if not tasks.isdecimal() or not times.isdecimal():
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not of the form 4(x2),3; unset it, srun sets it")
        counts += [int(tasks)] * int(times)
    return counts


def first_host(nodelist: str) -> str:
    """Returns the first host of a Slurm node list: `gpu[003-007,9],login1` -> `gpu003`; every rank gets the same."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    inside, _, tail = rest.partition("]")
    return head + inside.split(",")[0].split("-")[0] + tail.split(",")[0]


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process; batch scripts and salloc's shells also have SLURM_ variables."""
    step = env.get("SLURM_STEP_ID", "")
    return "SLURM_PROCID" in env and step.isdecimal() and int(step) < _FIRST_RESERVED_STEP


def _rank_of(env: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    rank, world_size = _integer(env, rank_name), _integer(env, size_name, least=1)
    if rank >= world_size:
        raise ValueError(
            f"{rank_name}={rank} is not below {size_name}={world_size}; ranks count from 0 and the launcher sets "
            "both: unset the one that was set by hand"
        )
    return rank, world_size


def _master_address(env: Mapping[str, str], launcher: str, one_node: bool) -> str:
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"]
    if one_node:
        return "127.0.0.1"
    raise ValueError(
        f"MASTER_ADDR is not set and {launcher} started ranks on several nodes; export MASTER_ADDR=HOST, the host "
        "of rank 0, before starting"
    )


def _port(env: Mapping[str, str], default: int = DEFAULT_PORT) -> int:
    return _integer(env, "MASTER_PORT", default=default, least=1)


def _integer(env: Mapping[str, str], name: str, default: int | None = None, least: int = 0) -> int:
    if name not in env and default is not None:
        return default
    value = env.get(name)
    if value is None or not value.isdecimal() or int(value) < least:
        found = "is not set" if value is None else f"is {value!r}"
        raise ValueError(
            f"environment variable {name} {found}; expected a whole number from {least}. The launcher sets it: "
            "start by torchrun, srun or mpirun, and set none of its variables by hand"
        )
    return int(value)
