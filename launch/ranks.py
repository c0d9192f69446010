"""`trivium launch`: the ranks of one machine, each a process with torchrun's variables set.

What it does: starts `python -m MODULE ARGS...` (train, sft and grpo stand for their modules) once a rank, shares the
cores among them, shows rank 0's output and keeps the others' in files, passes Ctrl-C, SIGTERM and SIGUSR1 on, and ends
with the exit status of the rank that failed first (so a bad config is still status 2, in one sentence), or, after a
signal, the one on which all agree: 75 is "nothing is lost, start me again". On several machines it is started on each
of them, by srun or with --node-rank and --master-address. What it leaves out: restarts and elastic worlds (torchrun has
them; every entrypoint also runs as `torchrun --nproc-per-node N -m MODULE CONFIG`); and srun and mpirun can start the
entrypoints without it.
"""

import argparse
import difflib
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from configs.cli import command_parser, entrypoint
from configs.loader import ConfigError
from configs.signals import INTERRUPTED, STOPPED
from launch.bootstrap import TRAINING
from launch.environment import DEFAULT_PORT, ClusterEnvironment
from launch.processes import ProcessGroup, cores

TAIL_LINES = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the ranks. Returns their exit status."""
    args = _parser().parse_args(argv)
    nnodes, node_rank, address, port = _nodes(args)
    ranks = [
        ClusterEnvironment(
            launcher="torchrun",
            rank=node_rank * args.nproc_per_node + local_rank,
            world_size=nnodes * args.nproc_per_node,
            local_rank=local_rank,
            local_world_size=args.nproc_per_node,
            node_rank=node_rank,
            master_address=address,
            master_port=port,
        )
        for local_rank in range(args.nproc_per_node)
    ]
    module = _module(args.module)
    return run_ranks([sys.executable, "-m", "launch.bootstrap", module, *args.args], ranks)


def _nodes(args: argparse.Namespace) -> tuple[int, int, str, int]:
    """(machines, number of this one, address and port of the first), of the options or of the Slurm step it runs in."""
    env = ClusterEnvironment.read()
    step = env if env.launcher == "slurm" and args.nnodes is None else None
    if step is not None and step.local_world_size > 1:
        raise ConfigError(
            f"srun started {step.local_world_size} tasks on this node, each a launcher of its own; give srun "
            f"--ntasks-per-node=1, or leave `trivium launch` out: srun --ntasks-per-node={args.nproc_per_node} python "
            f"-m {_module(args.module)} CONFIG"
        )
    nnodes = args.nnodes if args.nnodes is not None else step.world_size if step else 1
    node_rank = args.node_rank if args.node_rank is not None else step.rank if step else 0
    for name, number, least in (("nproc-per-node", args.nproc_per_node, 1), ("nnodes", nnodes, 1)):
        if number < least:
            raise ConfigError(f"--{name} {number} starts no rank; give 1 or more")
    if not 0 <= node_rank < nnodes:
        raise ConfigError(
            f"--node-rank {node_rank} is not one of --nnodes {nnodes} nodes; they count from 0 to {nnodes - 1}"
        )
    address = args.master_address or (step.master_address if step else None)
    if nnodes == 1:
        return 1, 0, "127.0.0.1", args.master_port or free_port()
    if address is None:
        raise ConfigError(f"--nnodes {nnodes} needs --master-address, a host name of node 0 that all can reach")
    return nnodes, node_rank, address, args.master_port or (step.master_port if step else DEFAULT_PORT)


def _module(name: str) -> str:
    """The module that `name` stands for: itself, or that of a command that trains."""
    if name in TRAINING:
        return TRAINING[name]
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # below what is no package; a name that is none
        found = None
    if found is not None and found.submodule_search_locations is None:
        return name
    inside = [command for command, module in TRAINING.items() if module.startswith(f"{name}.")]
    close = inside or difflib.get_close_matches(name, [*TRAINING, *TRAINING.values()], n=1)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(
        f"{name!r} is nothing that runs as ranks: give {', '.join(TRAINING)}, or a module as for `python -m`{hint}"
    )


def run_ranks(command: Sequence[str], ranks: Sequence[ClusterEnvironment]) -> int:
    """Starts `command`, by way of launch.bootstrap, once for each of `ranks` and waits.

    Returns the exit status of the whole.
    The first rank's output is ours; every other's goes to a file that is shown in part if it fails first.
    """
    threads = str(max(1, cores() // len(ranks)))
    try:
        logs = Path(tempfile.mkdtemp(prefix="trivium-ranks-"))
    except OSError as error:
        raise ConfigError(
            f"ranks' logs cannot be kept in {os.environ.get('TMPDIR', 'the temporary folder')}: {error.strerror}; make "
            "room there, or set TMPDIR to a folder that can be written to"
        ) from None
    with ProcessGroup() as group:
        for index, env_of_rank in enumerate(ranks):
            env = {**os.environ, **env_of_rank.as_variables(), "OMP_NUM_THREADS": threads}
            if index == 0:
                group.start(command, env, held_back=True)
            else:
                with open(logs / f"rank{env_of_rank.rank}.log", "wb") as log:
                    group.start(command, env, output=log, held_back=True)
        status = group.wait()
    # Status 2 is a refused config: every rank refuses it in the same words, and rank 0's were seen already.
    if status in (0, 2, STOPPED, INTERRUPTED):
        shutil.rmtree(logs)
    elif group.failed is not None:
        _tell(group.failed, ranks[group.failed].rank, status, logs)
    return status


def _tell(index: int, rank: int, status: int, logs: Path) -> None:
    how = f"died of signal {status - 128}" if status > 128 else f"ended with exit status {status}"
    print(f"rank {rank} {how}; the other ranks were stopped. Logs of ranks without a screen: {logs}", file=sys.stderr)
    if index > 0:
        lines = (logs / f"rank{rank}.log").read_text(errors="replace").splitlines()[-TAIL_LINES:]
        print(f"the end of rank {rank}'s log:", *lines, sep="\n  ", file=sys.stderr)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        prog="trivium launch",
        description="Runs an entrypoint as several ranks on this machine.",
        example="trivium launch --nproc-per-node 2 train configs/pretrain/demo.toml parallel.tp=2\n"
        "on two machines, the second one:\n  trivium launch --nproc-per-node 8 --nnodes 2 --node-rank 1 "
        "--master-address gpu0 train CONFIG\n"
        "on those of a Slurm job:\n  srun --ntasks-per-node=1 trivium launch --nproc-per-node 8 train CONFIG",
    )
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="ranks to start here (default 1)")
    parser.add_argument("--nnodes", type=int, metavar="N", help="machines in all (default: srun's tasks, else 1)")
    parser.add_argument("--node-rank", type=int, metavar="R", help="number of this machine, from 0")
    parser.add_argument("--master-address", metavar="HOST", help="host of node 0; needed where --nnodes > 1")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="a free port there (default: chosen)")
    parser.add_argument("module", metavar="COMMAND", help="train, sft, grpo, or a module, e.g. pretrain.train")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its CONFIG and key=value overrides")
    return parser


if __name__ == "__main__":
    entrypoint(main)
