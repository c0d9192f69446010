"""`trivium launch` by mpirun and torchrun: two MPIs, hosts over ssh, and two nodes whose link is cut in mid-step."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import storage
from tests.small_training import last_step, write_config

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
STEPS, ROWS = 200, 2000
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
MPIRUNS = {"mpich": str(Path(sys.executable).with_name("mpirun")), "open mpi": "/usr/bin/mpirun"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_config(folder, STEPS, folder / "run", rows=ROWS, every=10)


@pytest.fixture(scope="module")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The numbers of each step of two ranks that `trivium launch` starts here and nothing interrupts."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = launch("--nproc-per-node", "2", "train", str(config), f"run.dir={run}")
    assert done.returncode == 0, done.stderr
    return steps_of(run)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cli", "launch", *arguments]


def launch(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def steps_of(run: Path) -> list[dict]:
    """Returns the numbers of each step that do not depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "tokens", "loss", "grad_norm", "lr")
    return [{key: line[key] for key in keys} for line in lines if "loss" in line]


def wait_for(what: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=5)
        time.sleep(0.05)


@pytest.mark.parametrize("which", MPIRUNS)
def test_ranks_of_mpirun_find_each_other(
    config: Path, uninterrupted: list[dict], tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts ranks by mpirun, sends it a signal, after which they save, and goes on by the same command."""
    if shutil.which(MPIRUNS[which]) is None:
        pytest.skip(f"no {MPIRUNS[which]} here")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    run = tmp_path / "un été"
    mpirun = ("--set", f"mpirun={json.dumps([MPIRUNS[which]])}")
    arguments = ("--on", "mpi", *mpirun, "--nproc-per-node", "2", "train", str(config), f"run.dir={run}")
    first = subprocess.Popen(
        command(*arguments), cwd=ROOT, env={**os.environ, **ENVIRONMENT}, text=True, stdout=subprocess.PIPE
    )
    wait_for(lambda: last_step(run) >= 30, first)
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 75 and "stopped by SIGUSR1" in said
    assert 30 <= storage.steps(run)[-1] < STEPS
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout and steps_of(run) == uninterrupted


def test_an_mpirun_of_another_mpi_is_named(tmp_path: Path) -> None:
    """Starts ranks by the mpirun of another MPI, each of which would be rank 0 of 1 and write into the same folder."""
    script = f"import os, sys\nos.environ.update(OMPI_COMM_WORLD_RANK='0', OMPI_COMM_WORLD_SIZE='2')\n{MPI_RANK}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "2 ranks were started, but MPI sees 1" in done.stderr


MPI_RANK = "from launch.mpi_rank import main\nmain()"


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[list[str]]:
    """Command line of an ssh that logs into this machine, through a server of its own on two loopback addresses."""
    server = shutil.which("sshd", path=SBIN)
    if server is None:
        pytest.skip("no sshd here; install it: apt-get install openssh-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    settings = {
        "Port": port,
        "HostKey": tmp_path / "host",
        "PidFile": tmp_path / "pid",
        "AuthorizedKeysFile": tmp_path / "user.pub",
        "StrictModes": "no",
        "UsePAM": "no",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    listening = ["-o", "ListenAddress=127.0.0.1", "-o", "ListenAddress=127.0.0.2"]
    daemon = subprocess.Popen([server, "-D", "-e", "-f", "/dev/null", *listening, *options])
    known = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    yield ["ssh", "-p", str(port), "-i", str(tmp_path / "user"), "-o", "BatchMode=yes", *known]
    daemon.terminate()
    daemon.wait(10)


def test_torchrun_over_ssh_saves_after_a_signal_and_goes_on(
    config: Path, uninterrupted: list[dict], tmp_path: Path, ssh: list[str]
) -> None:
    run = tmp_path / "l'été"
    settings = {
        "hosts": ["127.0.0.1", "127.0.0.2"],
        "ssh": ssh,
        "environment": list(ENVIRONMENT),
        "port": free_port(),
    }
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    arguments = ("--on", "torchrun", *options, "train", str(config), f"run.dir={run}")
    env = {**os.environ, **ENVIRONMENT}
    first = subprocess.Popen(command(*arguments), cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE)
    wait_for(lambda: last_step(run) >= 30, first)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=120)
    assert first.returncode != 0 and "stopped by SIGTERM" in said
    assert 30 <= storage.steps(run)[-1] < STEPS
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout and steps_of(run) == uninterrupted


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


ADDRESSES = ("10.77.0.1", "10.77.0.2")
LINK = "link0"


def ip(*words: str) -> None:
    subprocess.run([shutil.which("ip", path=SBIN) or "ip", *words], check=True)


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a link between them, which stand for two machines."""
    if os.geteuid() != 0 or shutil.which("ip", path=SBIN) is None:
        pytest.skip("network namespaces need root and the command ip (apt-get install iproute2)")
    tag = secrets.token_hex(3)
    names = (f"trivium-{tag}-a", f"trivium-{tag}-b")
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", LINK, "netns", names[0], "type", "veth", "peer", "name", LINK, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", LINK)
            for link in ("lo", LINK):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in made:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:  # a failed test's
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "delete", name)


def test_a_node_that_is_cut_off_in_mid_step_ends_the_run_in_time_and_a_restart_goes_on(
    config: Path, uninterrupted: list[dict], tmp_path: Path, nodes: tuple[str, str]
) -> None:
    """Replaces the node that is cut off by one with an empty disk, before a checkpoint is in the run's folder."""
    run, local = tmp_path / "run", tmp_path / "local"
    disks = {node: tmp_path / f"disk of {node}" for node in nodes}
    for folder in (local, *disks.values()):
        folder.mkdir()
    watch = ("watchdog.least_seconds=5", "watchdog.first_seconds=100")
    watch += ("checkpoint.every=100", f"checkpoint.local_dir={local}", "checkpoint.local_every=10")
    printed = launch(
        *("--on", "torchrun", "--set", f"hosts={json.dumps(ADDRESSES)}", "--dry-run"),
        *("train", str(config), f"run.dir={run}", *watch),
    )
    assert printed.returncode == 0, printed.stderr
    commands = [shlex.split(line) for line in printed.stdout.splitlines()[1::2]]
    first = start_on(disks, local, commands)
    wait_for(lambda: last_step(run) >= 35, first[0])
    ip("-n", nodes[1], "link", "set", LINK, "down")
    cut = time.monotonic()
    said, _ = first[0].communicate(timeout=120)
    seconds = time.monotonic() - cut
    # Late after 5 s, told within twice that, and 30 s for torchrun and a machine that does other things.
    assert seconds < 60, f"{seconds:.0f} s\n{said}"
    assert first[0].returncode == 1 and re.search(r"exitcode *: 76", said), said[-3000:]
    assert (run / "hang").is_dir() and "rank 1" in said
    # No rank is left on the node that was cut off; its torchrun asks for the other one's for minutes, without ranks.
    while "pretrain.train" in "".join(commands_on(nodes[1])):
        assert time.monotonic() - cut < 60, commands_on(nodes[1])
        time.sleep(0.2)
    first[1].kill()
    first[1].communicate()
    ip("-n", nodes[1], "link", "set", LINK, "up")
    assert not storage.steps(run)
    shutil.rmtree(disks[nodes[1]])
    disks[nodes[1]].mkdir()
    again = start_on(disks, local, commands)
    both = [process.communicate(timeout=200)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], both
    gathered = re.search(r"gathered step (\d+) from .*, since it has no checkpoint itself", both[0])
    assert gathered and int(gathered[1]) >= 30, both[0]
    assert f"going on from {storage.directory(run, int(gathered[1]))}" in both[0] and steps_of(run) == uninterrupted


def commands_on(node: str) -> list[str]:
    """Returns the command lines of a namespace's processes but torchrun's own."""
    pids = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True, check=True).stdout.split()
    files = [Path(f"/proc/{pid}/cmdline") for pid in pids]
    found = [file.read_bytes().replace(b"\0", b" ").decode() for file in files if file.exists()]
    return [words for words in found if "torch.distributed.run" not in words]


def start_on(disks: dict[str, Path], local: Path, commands: list[list[str]]) -> "list[subprocess.Popen[str]]":
    """Starts a command on each node, which sees its own disk as the folder `local`."""
    mounted = ["sh", "-c", 'mount --bind "$1" "$2" && shift 2 && exec "$@"', "sh"]
    env = {**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": LINK}
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", node, *mounted, str(disk), str(local), *words],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for (node, disk), words in zip(disks.items(), commands, strict=True)
    ]
