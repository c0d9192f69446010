"""`trivium launch --on mpi`: starts a command's ranks by MPICH's or Open MPI's mpirun, or prints that command.

Each rank is `python -m launch.mpi_rank`, which finds its number through mpi4py. Data runs are started as they are,
since their own executor speaks MPI.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from configs.launch import LaunchConfig
from configs.loader import ConfigError
from launch.launched_command import LaunchedCommand
from launch.processes import ProcessGroup
from launch.slurm_submit import python_of

# Signals stay blocked until each rank has set its handlers.
BLOCKED = ("env", "--block-signal=INT,TERM,HUP,USR1")
# Seconds that Open MPI's mpirun gives ranks after SIGTERM, and sleeps whenever one has failed; its default is one.
# After SIGUSR1, which it only passes on, ranks have all the time they need.
SAVE_SECONDS = "30"


def start(command: LaunchedCommand, config: LaunchConfig, dry_run: bool) -> int:
    """Runs mpirun and returns its exit status; a dry run prints the command."""
    if not (command.trains or command.name == "data run"):
        raise ConfigError(f"`{command.name}` is one process, and mpirun would start it several times; use --on slurm")
    if config.nodes > 1 and not config.hosts:
        raise ConfigError(
            f'nnodes = {config.nodes} needs the machines for mpirun: set hosts, as in hosts=["gpu0", "gpu1"]'
        )
    words = mpirun_words(command, config, _is_open_mpi(config.mpirun))
    if dry_run:
        print(shlex.join(words))
        return 0
    with ProcessGroup() as group:
        group.start(words)
        return group.wait()


def mpirun_words(command: LaunchedCommand, config: LaunchConfig, open_mpi: bool) -> list[str]:
    """Returns the command of mpirun, as a list of words that no shell reads."""
    hosts, ranks = config.hosts or ("localhost",), config.nproc_per_node
    passed = [name for name in config.passed if name in os.environ]
    if open_mpi:
        options = ["--host", ",".join(f"{host}:{ranks}" for host in hosts)]
        options += [word for name in passed for word in ("-x", name)]
        options += ["--mca", "odls_base_sigkill_timeout", SAVE_SECONDS]
    else:
        options = ["-hosts", ",".join(hosts), "-ppn", str(ranks)] if config.hosts else []
        options += ["-genvlist", ",".join(passed)] if config.hosts else []
    module = ("launch.mpi_rank", command.module) if command.trains else ("launch.bootstrap", command.module)
    python = [*config.wrapper, python_of(config), "-m", *module]
    # mpi4py takes MPICH's library first, where both are installed.
    library = ("MPI4PY_MPIABI=openmpi",) if open_mpi else ()
    return [*config.mpirun, "-n", str(len(hosts) * ranks), *options, *BLOCKED, *library, *python, *command.arguments]


def _is_open_mpi(mpirun: Sequence[str]) -> bool:
    """Whether this mpirun is Open MPI's; it may be MPICH's. Raises ConfigError if it is neither, or is not there."""
    if shutil.which(mpirun[0]) is None:
        raise ConfigError(f"{mpirun[0]} is not on PATH; load the cluster's MPI, or pip install mpich, or set mpirun")
    done = subprocess.run([*mpirun, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if "Open MPI" in done.stdout:
        return True
    if "HYDRA" in done.stdout.upper() or "Intel(R) MPI" in done.stdout:
        return False
    raise ConfigError(f"{shlex.join(mpirun)} is neither Open MPI's nor MPICH's mpirun; set mpirun to the words of one")
