"""`trivium launch`: starts the ranks of one machine, each a process with torchrun's variables set.

It starts `python -m MODULE ARGS...` (train, sft, rm, dpo and grpo stand for their modules) once for each rank, divides
the cores among them, shows the first rank's output, keeps the others' in files, and passes Ctrl-C, SIGTERM and SIGUSR1
on. Its exit status is that of the rank that failed first (2 for a bad config), or, after a signal, the one that all
ranks have: 75 means that nothing is lost and the same command continues the run. On several machines it is started on
each, by srun or with --node-rank and --master-address. Restarts and elastic worlds are left to torchrun: every
entrypoint also runs as `torchrun --nproc-per-node N -m MODULE CONFIG`, and under srun or mpirun.
"""

import argparse
import contextlib
import difflib
import importlib.util
import os
import random
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
PORTS_HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")  # Linux: "first last"
LOWEST_PORT, TRIES = 10_000, 50  # of free_port


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the ranks that the command line asks for and returns their exit status."""
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
    """Returns (nnodes, node rank, master address, master port), from the options or the Slurm step it runs in."""
    env = ClusterEnvironment.read()
    step = env if env.launcher == "slurm" and args.nnodes is None else None
    if step is not None and step.local_world_size > 1:
        raise ConfigError(
            f"srun started `trivium launch` {step.local_world_size} times on this node; give srun --ntasks-per-node=1, "
            f"or leave `trivium launch` out: srun --ntasks-per-node={args.nproc_per_node} python "
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
        raise ConfigError(f"--nnodes {nnodes} needs --master-address, the host name of node 0 as other nodes reach it")
    return nnodes, node_rank, address, args.master_port or (step.master_port if step else DEFAULT_PORT)


def _module(name: str) -> str:
    """Module to run: that of a command that trains (train, sft, grpo), or `name` itself. Raises ConfigError if none."""
    if name in TRAINING:
        return TRAINING[name]
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # the parent is no package; the name is not valid
        found = None
    if found is not None and found.submodule_search_locations is None:
        return name
    inside = [command for command, module in TRAINING.items() if module.startswith(f"{name}.")]
    close = inside or difflib.get_close_matches(name, [*TRAINING, *TRAINING.values()], n=1)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    raise ConfigError(
        f"{name!r} cannot be started as ranks: give {', '.join(TRAINING)}, or a module as for `python -m`{hint}"
    )


def run_ranks(command: Sequence[str], ranks: Sequence[ClusterEnvironment]) -> int:
    """Runs `command`, which starts with launch.bootstrap, once for each of `ranks` and returns the exit status of all.

    The first rank's output is shown. Every other rank's goes to a file, whose end is shown if that rank fails first.
    """
    threads = str(max(1, cores() // len(ranks)))
    try:
        logs = Path(tempfile.mkdtemp(prefix="trivium-ranks-"))
    except OSError as error:
        raise ConfigError(
            f"the logs of ranks cannot be written to {os.environ.get('TMPDIR', 'the temporary folder')}: "
            f"{error.strerror}; make room there, or set TMPDIR to a folder that can be written to"
        ) from None
    with ProcessGroup() as group:
        for index, env_of_rank in enumerate(ranks):
            env = {**os.environ, **env_of_rank.as_variables(), "OMP_NUM_THREADS": threads}
            if index == 0:
                group.start(command, env, signals_blocked=True)
            else:
                with open(logs / f"rank{env_of_rank.rank}.log", "wb") as log:
                    group.start(command, env, output=log, signals_blocked=True)
        status = group.wait()
    # Status 2 is a mistake in the config: every rank prints the same message, and rank 0's was shown already.
    if status in (0, 2, STOPPED, INTERRUPTED):
        shutil.rmtree(logs)
    elif group.failed is not None:
        _print_failure(group.failed, ranks[group.failed].rank, status, logs)
    return status


def _print_failure(index: int, rank: int, status: int, logs: Path) -> None:
    how = f"was killed by signal {status - 128}" if status > 128 else f"ended with exit status {status}"
    print(
        f"rank {rank} {how}; the other ranks were stopped. Logs of the ranks whose output was not shown: {logs}",
        file=sys.stderr,
    )
    if index > 0:
        lines = (logs / f"rank{rank}.log").read_text(errors="replace").splitlines()[-TAIL_LINES:]
        print(f"last lines of rank {rank}'s log:", *lines, sep="\n  ", file=sys.stderr)


def free_port() -> int:
    """Returns a free TCP port, below those that the system hands out by itself if there is one.

    Rank 0 opens it seconds later, and until then a connection of any process could take one that the system hands out.
    """
    end = DEFAULT_PORT
    with contextlib.suppress(OSError):
        end = int(PORTS_HANDED_OUT.read_text().split()[0])
    # A seeded generator would give two programs with the same seed the same port.
    tries = [random.SystemRandom().randrange(LOWEST_PORT, max(end, LOWEST_PORT + 1)) for _ in range(TRIES)]
    for port in (*tries, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise ConfigError("no TCP port is free for ranks to meet at; end programs that hold them, or give --master-port")


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
    parser.add_argument("--node-rank", type=int, metavar="R", help="rank of this machine, from 0")
    parser.add_argument("--master-address", metavar="HOST", help="host of node 0; needed if --nnodes > 1")
    parser.add_argument(
        "--master-port",
        type=int,
        metavar="PORT",
        help="a free port on node 0 (default: chosen)",
    )
    parser.add_argument("module", metavar="COMMAND", help="train, sft, grpo, or a module, e.g. pretrain.train")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its CONFIG and key=value overrides")
    return parser


if __name__ == "__main__":
    entrypoint(main)
