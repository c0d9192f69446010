"""`trivium launch`: starts the ranks of a command, on this machine or, with --on, by torchrun, Slurm or mpirun.

--on local, the default, starts `python -m MODULE ARGS...` once for each rank of this machine, divides the cores among
them, shows the first rank's output, keeps the others' in files, and passes Ctrl-C, SIGTERM and SIGUSR1 on. Its exit
status is that of the rank that failed first (2 for a bad config), or, after a signal, the one that all ranks have: 75
means that nothing is lost and the same command continues the run. On several machines it is started on each, by srun,
as in the jobs of --on slurm, or with --node-rank and --master-address. Every entrypoint also runs as
`torchrun --nproc-per-node N -m MODULE CONFIG`, and under srun or mpirun.
"""

import argparse
import contextlib
import itertools
import os
import random
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from configs import presets
from configs.cli import command_parser, entrypoint
from configs.launch import LaunchConfig
from configs.loader import ConfigError, from_overrides, load
from configs.signals import INTERRUPTED, STOPPED
from launch import on_mpi, on_torchrun, slurm_submit
from launch.elastic import elastic_start
from launch.environment import DEFAULT_PORT, ClusterEnvironment
from launch.launched_command import (
    LaunchedCommand,
    check_input,
    check_is_ranks,
    command_of,
    is_command,
    module_of,
    read_command,
)
from launch.processes import ProcessGroup, cores
from launch.slurm_submit import Submission

CLUSTERS = Path(presets.__file__).parent / "launch"
TAIL_LINES = 30
PORTS_HANDED_OUT = Path("/proc/sys/net/ipv4/ip_local_port_range")  # Linux: "first last"
LOWEST_PORT, TRIES = 10_000, 50  # of free_port


def main(argv: Sequence[str] | None = None) -> int:
    """Starts what the command line asks for and returns its exit status."""
    args = _parser().parse_args(_options_first(sys.argv[1:] if argv is None else list(argv)))
    if args.module.endswith(".toml"):
        words = [*command_of(args.module, args.args).split(), args.module, *args.args]
        args.module, args.args = words[0], words[1:]
    _check_options(args)
    config = _config(args)
    if args.on == "local":
        return _on_this_machine(args, config)
    command = read_command([args.module, *args.args], config.world_size)
    if args.on != "torchrun" or config.hosts:  # else its commands are printed, to be started by hand
        check_input(command.module, command.arguments, config.nproc_per_node)
    if config.min_nodes and config.min_nodes < config.nodes and (command.trains or args.on == "mpi"):
        _check_elastic(args, config, command)
    if args.on == "slurm":
        return slurm_submit.submit(Submission(command, config, tuple(args.after), args.job_dir, args.dry_run))
    if args.on == "mpi":
        return on_mpi.start(command, config, args.dry_run)
    return on_torchrun.start(command, config, args.master_address, args.dry_run)


def _options_first(argv: list[str]) -> list[str]:
    """Returns the words with the launcher's options before the command, wherever between its words they were.

    The words after a module that is no command are its own. `--dry-run` after a command is the command's for ranks of
    this machine, which do no work then, and the launcher's for what would be submitted or started elsewhere.
    """
    before: list[str] = []
    after: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name in WITH_VALUE:
            before += [word] if equals else [word, *itertools.islice(words, 1)]
        elif not after and word.startswith("-"):
            before.append(word)
        elif after or is_command(word):
            after.append(word)
        else:
            return [*before, word, *words]
    if "--dry-run" in after and not {"local", "--on=local"} & set(before) and any(w.startswith("--on") for w in before):
        before.append(after.pop(after.index("--dry-run")))
    return [*before, *after]


# Options that take a value. No command has one of the same name.
WITH_VALUE = (
    *("--on", "--cluster", "--set", "--nproc-per-node", "--nnodes", "--min-nodes", "--after"),
    *("--job-dir", "--node-rank", "--master-address", "--master-port"),
)
# Options that not every way of starting has, and those that have it.
ONLY_ON = {
    "node_rank": ("local",),
    "master_address": ("local", "torchrun"),
    "master_port": ("local",),
    "after": ("slurm",),
    "job_dir": ("slurm",),
}


def _check_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for an option that is given and that this way of starting ranks does not have."""
    for option, ways in ONLY_ON.items():
        if getattr(args, option) not in (None, "", []) and args.on not in ways:
            raise ConfigError(
                f"--{option.replace('_', '-')} is for --on {' or '.join(ways)}; leave it out of --on {args.on}"
            )


def _config(args: argparse.Namespace) -> LaunchConfig:
    """Reads the launch config, with the options of the command line in it. Raises ConfigError if it is wrong."""
    for name, number in (
        ("nproc-per-node", args.nproc_per_node),
        ("nnodes", args.nnodes),
        ("min-nodes", args.min_nodes),
    ):
        if number is not None and number < 1:
            raise ConfigError(f"--{name} {number} starts no rank; give 1 or more")
    overrides = list(args.set)
    overrides += [f"nproc_per_node={args.nproc_per_node}"] if args.nproc_per_node else []
    overrides += [f"nnodes={args.nnodes}"] if args.nnodes else []
    overrides += [f"min_nodes={args.min_nodes}"] if args.min_nodes else []
    if not args.cluster:
        return from_overrides(LaunchConfig, overrides)
    known = sorted(path.stem for path in CLUSTERS.glob("*.toml"))
    if "/" not in args.cluster and not args.cluster.endswith(".toml") and args.cluster not in known:
        raise ConfigError(f"--cluster {args.cluster} is none of {', '.join(known)}, and no file; name a .toml file")
    return load(LaunchConfig, CLUSTERS / f"{args.cluster}.toml" if args.cluster in known else args.cluster, overrides)


def _check_elastic(args: argparse.Namespace, config: LaunchConfig, command: LaunchedCommand) -> None:
    """Raises ConfigError if the command cannot be started on fewer machines than the launch config has."""
    if args.on == "mpi":
        raise ConfigError("min_nodes is for local, torchrun and slurm; for mpirun set hosts to those that are there")
    if args.on == "torchrun" and not config.hosts:
        raise ConfigError("min_nodes needs hosts, of which those that answer over ssh are used; set hosts")
    elastic_start(command.module, command.arguments, config.nodes, config.nproc_per_node, config.nodes)


def _on_this_machine(args: argparse.Namespace, config: LaunchConfig) -> int:
    """Runs the ranks of this machine and returns their exit status."""
    if config.hosts:
        raise ConfigError("hosts names other machines, and --on local starts ranks here alone; use --on torchrun")
    check_is_ranks([args.module, *args.args])
    module = module_of(args.module)
    check_input(module, args.args, config.nproc_per_node)
    args.nproc_per_node, args.nnodes = config.nproc_per_node, config.nnodes
    nnodes, node_rank, address, port = _nodes(args)
    per_node = here = args.nproc_per_node
    world_size = nnodes * per_node
    if config.min_nodes is not None:
        if nnodes < config.min_nodes:
            raise ConfigError(
                f"{nnodes} machines are fewer than min_nodes = {config.min_nodes}; start it on as many, or set "
                f"min_nodes={nnodes}"
            )
        start = elastic_start(module, args.args, nnodes, per_node)
        args.args, world_size, here = start.arguments, start.ranks, start.ranks_on(node_rank, per_node)
        if start.said and (node_rank == 0 or not here):
            print(f"elastic: {start.said}{'' if here else '; this node has no rank'}", flush=True)
        if not here:
            return 0
    ranks = [
        ClusterEnvironment(
            launcher="torchrun",
            rank=node_rank * per_node + local_rank,
            world_size=world_size,
            local_rank=local_rank,
            local_world_size=here,
            node_rank=node_rank,
            master_address=address,
            master_port=port,
        )
        for local_rank in range(here)
    ]
    command = [sys.executable, "-m", "launch.bootstrap", module, *args.args]
    if args.dry_run:
        print(
            f"{len(ranks)} of {ranks[0].world_size} ranks here, {max(1, cores() // len(ranks))} threads each: ", end=""
        )
        print(shlex.join(command))
        return 0
    return run_ranks(command, ranks)


def _nodes(args: argparse.Namespace) -> tuple[int, int, str, int]:
    """Returns (nnodes, node rank, master address, master port), from the options or the Slurm step it runs in."""
    env = ClusterEnvironment.read()
    step = env if env.launcher == "slurm" and args.nnodes is None else None
    if step is not None and step.local_world_size > 1:
        raise ConfigError(
            f"srun started `trivium launch` {step.local_world_size} times on this node; give srun --ntasks-per-node=1, "
            f"or leave `trivium launch` out: srun --ntasks-per-node={args.nproc_per_node} python "
            f"-m {module_of(args.module)} CONFIG"
        )
    nnodes = args.nnodes if args.nnodes is not None else step.world_size if step else 1
    node_rank = args.node_rank if args.node_rank is not None else step.rank if step else 0
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
        description="Starts a command as ranks: on this machine, by torchrun or mpirun, or as a job of Slurm.",
        example="trivium launch --nproc-per-node 2 train configs/pretrain/demo.toml parallel.tp=2\n"
        "the options may come last, and a config alone says what its command is:\n"
        "  trivium launch configs/pretrain/demo.toml --nproc-per-node 2\n"
        "a job of Slurm on two nodes of 8 GPUs, printed and then submitted:\n"
        "  trivium launch --on slurm --cluster h100 --nnodes 2 --dry-run train CONFIG\n"
        "  trivium launch --on slurm --cluster h100 --nnodes 2 train CONFIG\n"
        "a job after another one, and a recipe as a chain of jobs:\n"
        "  trivium launch --on slurm --cluster h100 --after 4711 sft CONFIG\n"
        "  trivium launch --on slurm --cluster h100 recipe run RECIPE\n"
        "the command of torchrun for each of two machines, or started there over ssh:\n"
        "  trivium launch --on torchrun --nnodes 2 --nproc-per-node 8 --master-address gpu0 train CONFIG\n"
        '  trivium launch --on torchrun --set \'hosts=["gpu0", "gpu1"]\' --nproc-per-node 8 train CONFIG\n'
        "eight ranks of mpirun:\n"
        "  trivium launch --on mpi --nproc-per-node 8 train CONFIG\n"
        "by hand on two machines, the second one:\n  trivium launch --nproc-per-node 8 --nnodes 2 --node-rank 1 "
        "--master-address gpu0 train CONFIG\n\n"
        "every key of a launch config: trivium config --explain launch",
    )
    parser.add_argument(
        "--on",
        choices=("local", "torchrun", "slurm", "mpi"),
        default="local",
        help="who starts the ranks (default local)",
    )
    parser.add_argument(
        "--cluster", metavar="FILE", default="", help="a launch config: cpu, h100 or a100 of configs/launch, or a file"
    )
    parser.add_argument(
        "--set", metavar="key=value", action="append", default=[], help="an override of the launch config"
    )
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="ranks on each machine (default 1)")
    parser.add_argument("--nnodes", type=int, metavar="N", help="machines in all (default: srun's tasks, else 1)")
    parser.add_argument("--min-nodes", type=int, metavar="N", help="the fewest machines that training goes on with")
    parser.add_argument("--dry-run", action="store_true", help="print the script or the commands, and start nothing")
    parser.add_argument(
        "--after", metavar="JOB", action="append", default=[], help="slurm: a job that has to succeed before"
    )
    parser.add_argument(
        "--job-dir", metavar="DIR", default="", help="slurm: the folder of script and output (default run.dir/launch)"
    )
    parser.add_argument("--node-rank", type=int, metavar="R", help="local: rank of this machine, from 0")
    parser.add_argument("--master-address", metavar="HOST", help="local, torchrun: host of node 0, if --nnodes > 1")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="local: a free port on node 0")
    parser.add_argument(
        "module",
        metavar="COMMAND",
        help="train, sft and so on, or a module; on slurm also data run, export and recipe run",
    )
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="its CONFIG and key=value overrides")
    return parser


if __name__ == "__main__":
    entrypoint(main)
