"""Ranks as set by torchrun, srun and mpirun, from variables in the form that each launcher really uses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.environment import ClusterEnvironment, expand_counts, first_host, mpi_rank_and_world

ROOT = Path(__file__).resolve().parents[3]
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "gpu7",
    "MASTER_PORT": "4242",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}


def test_torchrun() -> None:
    assert ClusterEnvironment.read(TORCHRUN) == ClusterEnvironment("torchrun", 3, 4, 1, 2, 1, "gpu7", 4242)
    assert ClusterEnvironment.read(TORCHRUN).init_method == "tcp://gpu7:4242"


def test_srun_over_nodes_of_different_size() -> None:
    read = ClusterEnvironment.read(SRUN)
    assert read == ClusterEnvironment("slurm", 9, 11, 1, 3, 2, "gpu003", 20000 + 123456 % 10000)
    assert ClusterEnvironment.read({**SRUN, "MASTER_PORT": "5", "MASTER_ADDR": "x"}).init_method == "tcp://x:5"


def test_mpirun() -> None:
    openmpi = ClusterEnvironment.read(OPENMPI)
    assert (openmpi.launcher, openmpi.rank, openmpi.world_size, openmpi.local_rank) == ("openmpi", 1, 2, 1)
    mpich = ClusterEnvironment.read(MPICH)
    assert (mpich.launcher, mpich.rank, mpich.world_size, mpich.node_rank) == ("mpich", 1, 4, 0)
    assert mpich.master_address == "127.0.0.1"


def test_work_over_mpi_needs_no_rendezvous() -> None:
    over_nodes = {**MPICH, "MPI_LOCALNRANKS": "2"}
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        ClusterEnvironment.read(over_nodes)
    assert [mpi_rank_and_world(env) for env in (over_nodes, OPENMPI, SRUN)] == [(1, 4), (1, 2), (9, 11)]
    assert mpi_rank_and_world({}) == mpi_rank_and_world(TORCHRUN) == (0, 1)


def test_the_innermost_launcher_holds() -> None:
    assert ClusterEnvironment.read({**SRUN, **MPICH, **OPENMPI, **TORCHRUN}).launcher == "torchrun"
    assert ClusterEnvironment.read({**SRUN, **MPICH}).launcher == "mpich"


@pytest.mark.parametrize("step", [None, "4294967290", "4294967291", "batch"])
def test_a_shell_of_sbatch_or_salloc_is_no_rank(step: str | None) -> None:
    env = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    read = ClusterEnvironment.read(env if step is None else {**env, "SLURM_STEP_ID": step})
    assert (read.launcher, read.rank, read.world_size) == ("single", 0, 1)


def test_no_launcher_is_a_world_of_one() -> None:
    read = ClusterEnvironment.read({})
    assert read == ClusterEnvironment("single", 0, 1, 0, 1, 0, "127.0.0.1", 29500)
    assert read.is_main
    assert read.as_dict().keys() == ClusterEnvironment.read(TORCHRUN).as_dict().keys() - {
        "master_address",
        "master_port",
    }


def test_variables_read_back_as_the_same_environment() -> None:
    env = ClusterEnvironment.read(TORCHRUN)
    assert ClusterEnvironment.read(env.as_variables()) == env


@pytest.mark.parametrize(
    ("env", "words", "unset"),
    [
        (
            {**TORCHRUN, "RANK": "4"},
            "RANK=4 is not below WORLD_SIZE=4; ranks count from 0 and the launcher sets both",
            "RANK",
        ),
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x'", "RANK"),
        ({"RANK": "0"}, "WORLD_SIZE is not set", "RANK"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'", None),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'", "MASTER_PORT"),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "MASTER_ADDR is not set and openmpi", None),
        ({**SRUN, "SLURM_NODEID": "3"}, "SLURM_NODEID=3 is beyond", None),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4x2"}, "='4x2' is not of the form 4(x2),3; unset it, srun", None),
    ],
)
def test_what_is_wrong_is_named(env: dict[str, str], words: str, unset: str | None) -> None:
    """Follows the remedy: without the variable `unset`, or with the launcher's values if it is None, all is read."""
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        ClusterEnvironment.read(env)
    if "export MASTER_ADDR=HOST" in str(raised.value):
        assert ClusterEnvironment.read({**env, "MASTER_ADDR": "gpu7"}).master_address == "gpu7"
        return
    assert re.search(r"unset (the one|what) .*by hand|unset it|set none of its variables by hand", str(raised.value))
    if unset is None:
        env = {
            **env,
            **{name: value for told in (TORCHRUN, SRUN) if told.keys() <= env.keys() for name, value in told.items()},
        }
    ClusterEnvironment.read({name: value for name, value in env.items() if name != unset})


def test_slurm_notation() -> None:
    assert expand_counts("4(x2),3") == [4, 4, 3]
    assert expand_counts("1") == [1]
    for nodes, host in (
        ("gpu[003-007,9],login1", "gpu003"),
        ("login1,gpu[1-2]", "login1"),
        ("n1", "n1"),
        ("rack1-n[4,7-9]-ib", "rack1-n4-ib"),
    ):
        assert first_host(nodes) == host


def test_torchrun_finds_a_ranks_reason(tmp_path: Path) -> None:
    """Reads the error file by torchrun's own classes."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    file = tmp_path / "error.json"
    argv = [sys.executable, "-m", "pretrain.train", "configs/none.toml"]
    env = {**os.environ, **TORCHRUN, "TORCHELASTIC_ERROR_FILE": str(file)}
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, ""), "rank 3 does not speak"
    report = str(ChildFailedError("pretrain.train", {3: ProcessFailure(1, 99, 2, str(file))}))
    assert "traceback : error: config file configs/none.toml does not exist; presets are under configs/" in report
