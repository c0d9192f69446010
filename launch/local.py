"""`trivium launch`: the ranks of one machine, each a process with torchrun's variables set.

What it does: starts `python -m MODULE ARGS...` once a rank, shares the cores among them, shows rank 0's output
and keeps the others' in files, passes Ctrl-C, SIGTERM and SIGUSR1 on, and ends with the exit status of the rank
that failed first (so a bad config is still status 2, in one sentence), or, after a signal, the one on which all agree:
75 is "a checkpoint is saved, start me again". For several machines it is started on each of them with
--node-rank and --master-address. What it leaves out: restarts and elastic worlds (torchrun has them; every
entrypoint also runs as `torchrun --nproc-per-node N -m MODULE CONFIG`) and Slurm and MPI, whose own launchers
start the entrypoints directly.
"""

import argparse
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from configs.loader import ConfigError, command_parser, entrypoint
from launch.environment import DEFAULT_PORT, STOPPED, ClusterEnvironment
from launch.processes import ProcessGroup, cores

TAIL_LINES = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the ranks. Returns their exit status."""
    args = _parser().parse_args(argv)
    for name in ("nproc_per_node", "nnodes"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} starts no rank; give 1 or more")
    if not 0 <= args.node_rank < args.nnodes:
        raise ConfigError(
            f"--node-rank {args.node_rank} is not one of --nnodes {args.nnodes} nodes; they count from 0 to "
            f"{args.nnodes - 1}"
        )
    if args.nnodes > 1 and args.master_address is None:
        raise ConfigError(f"--nnodes {args.nnodes} needs --master-address, a host name of node 0 that all can reach")
    if args.nnodes == 1:
        address, port = "127.0.0.1", args.master_port or free_port()
    else:
        address, port = args.master_address, args.master_port or DEFAULT_PORT
    places = [
        ClusterEnvironment(
            launcher="torchrun",
            rank=args.node_rank * args.nproc_per_node + local_rank,
            world_size=args.nnodes * args.nproc_per_node,
            local_rank=local_rank,
            local_world_size=args.nproc_per_node,
            node_rank=args.node_rank,
            master_address=address,
            master_port=port,
        )
        for local_rank in range(args.nproc_per_node)
    ]
    return run_ranks([sys.executable, "-m", args.module, *args.args], places)


def run_ranks(command: Sequence[str], places: Sequence[ClusterEnvironment]) -> int:
    """Starts `command` once at each place of this machine and waits. Returns the exit status of the whole.

    The first place's output is ours; every other's goes to a file that is shown in part if it fails first.
    """
    threads = str(max(1, cores() // len(places)))
    logs = Path(tempfile.mkdtemp(prefix="trivium-ranks-"))
    with ProcessGroup() as group:
        for index, place in enumerate(places):
            env = {**os.environ, **place.as_variables(), "OMP_NUM_THREADS": threads}
            if index == 0:
                group.start(command, env)
            else:
                with open(logs / f"rank{place.rank}.log", "wb") as log:
                    group.start(command, env, output=log)
        status = group.wait()
    # Status 2 is a refused config: every rank refuses it in the same words, and rank 0's were seen already.
    if status in (0, 2, STOPPED, 130):
        shutil.rmtree(logs)
    elif group.failed is not None:
        _tell(group.failed, places[group.failed].rank, status, logs)
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
        example="trivium launch --nproc-per-node 2 pretrain.train configs/pretrain/demo.toml parallel.tp=2\n"
        "on two machines, the second one:\n  trivium launch --nproc-per-node 8 --nnodes 2 --node-rank 1 "
        "--master-address gpu0 pretrain.train CONFIG",
    )
    parser.add_argument("--nproc-per-node", type=int, default=1, metavar="N", help="ranks to start here (default 1)")
    parser.add_argument("--nnodes", type=int, default=1, metavar="N", help="machines in all (default 1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    parser.add_argument("--master-address", metavar="HOST", help="host of node 0; needed where --nnodes > 1")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="a free port there (default: chosen)")
    parser.add_argument("module", metavar="MODULE", help="e.g. pretrain.train, posttrain.sft")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its CONFIG and key=value overrides")
    return parser


if __name__ == "__main__":
    entrypoint(main)
