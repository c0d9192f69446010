"""Remedies in messages of `trivium launch`: each is done word for word, and the launch is accepted then."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.loader import ConfigError
from launch import ranks

ROOT = Path(__file__).resolve().parents[3]
TRAIN = ["train", str(ROOT / "configs/pretrain/demo.toml")]
EXPORT = ["export", str(ROOT / "configs/export/demo.toml")]
RECIPE = ["recipe", "run", str(ROOT / "configs/recipes/demo.toml")]
DATA = ["data", "run", str(ROOT / "configs/data/demo.toml")]
SFT = ["sft", str(ROOT / "configs/posttrain/demo_sft.toml")]
SLEEP = ["tests.e2e.steps_of_sleep", "x"]
HOSTS = ["--set", 'hosts=["gpu0", "gpu1"]']
TUNED = ["train", "tuned.toml", "run.dir=y"]  # whose model comes from files of another run
CPU = str(ROOT / "configs/launch/cpu.toml")
UNSHARE = shutil.which("unshare")


@pytest.mark.parametrize(
    ("way", "refused", "said", "right"),
    [
        ("torchrun", ["--nnodes", "2", *TRAIN], "needs --master-address", ["--nnodes=2", "--master-address=a", *TRAIN]),
        ("torchrun", ["--nnodes", "2", *TRAIN], 'or hosts, as in hosts=["gpu0", "gpu1"]', [*HOSTS, *TRAIN]),
        ("torchrun", ["--nnodes=2", "--min-nodes=1", *TRAIN], "set hosts", [*HOSTS, "--min-nodes=1", *TRAIN]),
        ("torchrun", EXPORT, f"start it as `trivium {' '.join(EXPORT)}`", []),
        ("mpi", ["--nnodes", "2", *TRAIN], 'set hosts, as in hosts=["gpu0", "gpu1"]', [*HOSTS, *TRAIN]),
        ("local", [*HOSTS, *TRAIN], "use --on torchrun", ["--on", "torchrun", *HOSTS, *TRAIN]),
        ("mpi", EXPORT, "use --on slurm", ["--on", "slurm", *EXPORT]),
        ("slurm", [*HOSTS, *TRAIN], "set nnodes, and leave hosts out", ["--set", "nnodes=2", *TRAIN]),
        ("slurm", [*TRAIN, "--resume", "no"], "leave it out, and name another run.dir", [*TRAIN, "run.dir=other"]),
        ("slurm", [*RECIPE, "--until", "sft"], "leave it out, each stage is a job", RECIPE),
        ("slurm", ["--after", "x7", *TRAIN], "is no number of a job", ["--after", "7", *TRAIN]),
        ("slurm", ["--node-rank", "1", *TRAIN], "leave it out of --on slurm", TRAIN),
        (
            "slurm",
            ["--cluster", "h200", *TRAIN],
            "none of a100, cpu, h100, and no file; name a .toml file",
            ["--cluster", "cpu", *TRAIN],
        ),
        (
            "slurm",
            ["--set", "setup=gone", *TRAIN],
            "write the shell commands into one",
            ["--set", "setup=a.sh", *TRAIN],
        ),
        ("slurm", SLEEP, "give one, as in --job-dir runs/job", ["--job-dir", "runs/job", *SLEEP]),
        ("slurm", ["train"], "as in `trivium launch train CONFIG`", TRAIN),
        ("slurm", [CPU], f"give it as --cluster {CPU}, and after it a command", ["--cluster", CPU, *TRAIN]),
        ("slurm", ["datarun", DATA[2]], "did you mean `data run`?", DATA),
        ("slurm", ["data", "rnu", DATA[2]], "did you mean `data run`?", DATA),
        ("slurm", ["--nnodes=2", "--min-nodes=1", *SFT], "leave min_nodes out", ["--nnodes=2", *SFT]),
        (
            "slurm",
            ["--nnodes=2", "--min-nodes=3", *TRAIN],
            "set min_nodes=2",
            ["--nnodes=2", "--set=min_nodes=2", *TRAIN],
        ),
        ("slurm", ["--set", 'slurm.options=["--nodes=2"]', *TRAIN], "set nnodes", ["--set", "nnodes=2", *TRAIN]),
        ("slurm", ["--set", "slurm.time=soon", *TRAIN], '"2-12:00:00"', ["--set", "slurm.time=2-12:00:00", *TRAIN]),
        ("slurm", ["--set", 'environment=["A=b"]', *TRAIN], "write the name", ["--set", 'environment=["A"]', *TRAIN]),
        ("slurm", ["--nnodes=2", "--min-nodes=1", *TUNED], "leave min_nodes out", ["--nnodes=2", *TUNED]),
        ("slurm", TUNED[:-1], "key 'run.dir' is missing; set it in the file or as run.dir=VALUE", TUNED),
        (
            "slurm",
            ["--job-dir", "a\\b", *TRAIN],
            "cannot hold the output of a Slurm job; choose another path",
            ["--job-dir", "ab", *TRAIN],
        ),
        ("local", ["--min-nodes=2", *TRAIN], "start it on as many, or set min_nodes=1", ["--min-nodes=1", *TRAIN]),
        (
            "local",
            ["--min-nodes=2", *TRAIN],
            "1 machines are fewer than min_nodes = 2; start it on as many",
            ["--min-nodes=2", "--nnodes=2", "--node-rank=0", "--master-address=a", *TRAIN],
        ),
        ("local", ["sfft", SFT[1]], "did you mean sft?", SFT),
        ("local", ["trivium", *TRAIN], "leave out the word 'trivium'", TRAIN),
        (
            "local",
            ["--nnodes=2", "--node-rank=2", *TRAIN],
            "they count from 0 to 1",
            [
                "--nnodes=2",
                "--node-rank=1",
                "--master-address=a",
                *TRAIN,
            ],
        ),
        ("local", ["--nproc-per-node=0", *TRAIN], "starts no rank; give 1 or more", ["--nproc-per-node=1", *TRAIN]),
        (
            "mpi",
            ["--set", 'mpirun=["no-mpirun"]', *TRAIN],
            "is not on PATH; load the cluster's MPI, or pip install",
            [],
        ),
        ("mpi", ["--set", 'mpirun=["true"]', *TRAIN], "set mpirun to the words of one", []),
        ("local", ["chat", "runs/x"], "is started as `trivium chat RUN`, without `launch`", []),
    ],
)
def test_a_launch_is_accepted_once_its_message_was_followed(
    way: str, refused: list[str], said: str, right: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.sh").write_text("module load cuda\n")
    Path("tuned.toml").write_text('[init]\nrun = "x"\n[train]\nsteps = 9\n[data]\nplan = "p"\n')
    with pytest.raises(ConfigError) as raised:
        ranks.main(["--on", way, "--dry-run", *refused])
    assert said in str(raised.value)
    if right:
        assert ranks.main([*(() if "--on" in right else ("--on", way)), "--dry-run", *right]) == 0


WITHOUT_PORTS = """
import contextlib, socket, sys
from pathlib import Path
from configs.loader import ConfigError
from launch import ranks

Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("1100 1101")
with contextlib.ExitStack() as held:
    for port in (1100, 1101, ranks.LOWEST_PORT):
        held.enter_context(socket.socket()).bind(("", port))
    try:
        ranks.main(sys.argv[1:])
    except ConfigError as error:
        print(error)
    assert ranks.main(["--master-port=1200", *sys.argv[1:]]) == 0
assert ranks.main(sys.argv[1:]) == 0
"""


def test_ranks_meet_once_a_port_is_free_or_given_as_the_message_says() -> None:
    """Launches in a network namespace of its own, all of whose ports are taken."""
    own = ["unshare", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("needs unshare of util-linux, and the right to make a network namespace")
    argv = [*own, sys.executable, "-c", WITHOUT_PORTS, "--nproc-per-node=1", "--dry-run", *TRAIN]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "no TCP port is free for ranks to meet at; end programs that hold them, or give --master-port\n" in done.stdout
    )
