"""`trivium launch` with small scripts as ranks: their environment, and how failures and signals end all of them."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from launch import ranks
from launch.bootstrap import ON_RANKS, TRAINING
from launch.launched_command import module_of

ROOT = Path(__file__).resolve().parents[3]


def launcher(folder: Path, script: str, *options: str, nproc: int = 2) -> subprocess.Popen[str]:
    """Starts `script` as module `rank_script` on `nproc` ranks; `folder` is its argument and in PYTHONPATH."""
    (folder / "rank_script.py").write_text("import os, sys, time, signal, pathlib\n" + script)
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env["PYTHONPATH"] = f"{folder}{os.pathsep}{ROOT}"
    command = ["-m", "launch.ranks", "--nproc-per-node", str(nproc), *options, "rank_script", str(folder)]
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for(folder: Path, *names: str) -> list[int]:
    """Waits for the files that ranks write when they run; returns the process ids in them."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        texts = [(folder / name).read_text() if (folder / name).exists() else "" for name in names]
        if all(texts):
            return [int(text) for text in texts]
        time.sleep(0.05)
    raise AssertionError(f"{names} were not all written")


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie, which nobody has waited for yet, does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


UP = "pathlib.Path(sys.argv[1], 'up' + os.environ['RANK']).write_text(str(os.getpid()))\n"


def test_every_rank_is_told_its_rank_and_its_share_of_the_cores(tmp_path: Path) -> None:
    script = (
        "names = 'RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS'.split()\n"
        "pathlib.Path(sys.argv[1], 'rank' + os.environ['RANK']).write_text(' '.join(map(os.environ.get, names)))\n"
        "print('hello from', os.environ['RANK'])\n"
    )
    process = launcher(tmp_path, script, "--nnodes", "2", "--node-rank", "1", "--master-address", "node0")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (tmp_path / "rank2").read_text() == f"2 4 0 2 node0 {threads}"
    assert (tmp_path / "rank3").read_text() == f"3 4 1 2 node0 {threads}"
    assert output.strip() == "hello from 2"


def test_the_failing_rank_decides_the_status_and_the_others_are_ended(tmp_path: Path) -> None:
    script = UP + "if os.environ['RANK'] == '1': sys.exit('the reason')\ntime.sleep(60)\n"
    start = time.monotonic()
    process = launcher(tmp_path, script)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "rank 1 ended with exit status 1" in output and "the reason" in output
    assert time.monotonic() - start < 20
    assert not any(alive(pid) for pid in wait_for(tmp_path, "up0", "up1"))


def test_a_refused_config_is_status_2_told_once(tmp_path: Path) -> None:
    process = launcher(tmp_path, "print('error: no', file=sys.stderr)\nsys.exit(2)\n")
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output.strip()) == (2, "error: no")


def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    process = launcher(tmp_path, UP + "time.sleep(60)\n")
    os.kill(wait_for(tmp_path, "up0", "up1")[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 137
    told = "rank 1 was killed by signal 9; the other ranks were stopped. Logs of the ranks whose output was not shown: "
    assert told in output and Path(output.split(told)[1].splitlines()[0], "rank1.log").is_file()


def test_a_stopped_rank_ends_with_the_others(tmp_path: Path) -> None:
    """Stops a rank by SIGSTOP, after which it answers no SIGTERM until it goes on."""
    process = launcher(tmp_path, UP + "if os.environ['RANK'] == '0': time.sleep(1); sys.exit(76)\ntime.sleep(60)\n")
    start = time.monotonic()
    os.kill(wait_for(tmp_path, "up0", "up1")[1], signal.SIGSTOP)
    process.communicate(timeout=50)
    assert process.returncode == 76 and time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("number", "ends", "status"),
    [
        (signal.SIGINT, "sys.exit(130)", 130),
        (signal.SIGTERM, "sys.exit(75)", 75),
        (signal.SIGUSR1, "sys.exit(75)", 75),
        (signal.SIGTERM, "sys.exit(0)", 0),  # the ranks had finished their work
        (signal.SIGTERM, "sys.exit(75 if os.environ['RANK'] == '0' else 0)", 75),
        (signal.SIGTERM, "sys.exit(75 if os.environ['RANK'] == '0' else 1)", 1),  # a failure is more than a stop
    ],
)
def test_a_signal_reaches_every_rank_once_and_the_status_is_theirs(
    tmp_path: Path, number: int, ends: str, status: int
) -> None:
    script = (
        "def stop(number, frame):\n"
        "    with open(pathlib.Path(sys.argv[1], 'got' + os.environ['RANK']), 'a') as f: f.write('1')\n"
        f"    time.sleep(0.5); {ends}\n"
        f"signal.signal({int(number)}, stop)\n" + UP + "time.sleep(60)\n"
    )
    process = launcher(tmp_path, script)
    wait_for(tmp_path, "up0", "up1")
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert wait_for(tmp_path, "got0", "got1") == [1, 1]


def test_a_signal_after_a_failure_does_not_hide_it(tmp_path: Path) -> None:
    """Stops rank 1 by the signal while it is still importing; rank 0 has refused its config before."""
    refuses = "if os.environ['RANK'] == '0': print('error: no', file=sys.stderr); sys.stderr.flush(); os._exit(2)\n"
    script = "signal.signal(signal.SIGTERM, lambda *_: os._exit(75))\n" + UP + refuses + "time.sleep(60)\n"
    process = launcher(tmp_path, script)
    refused, _ = wait_for(tmp_path, "up0", "up1")
    while alive(refused):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output.strip()) == (2, "error: no")


def test_no_rank_and_no_child_of_a_rank_survives_the_launcher(tmp_path: Path) -> None:
    child = (
        "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\n"
        "pathlib.Path(sys.argv[1], 'child' + os.environ['RANK']).write_text(str(child.pid))\n"
    )
    process = launcher(tmp_path, child + UP + "time.sleep(60)\n")
    pids = wait_for(tmp_path, "up0", "up1", "child0", "child1")
    assert all(alive(pid) for pid in pids)
    process.kill()
    process.wait(timeout=30)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def test_children_that_ranks_leave_behind_are_ended_too(tmp_path: Path) -> None:
    script = (
        "import subprocess\nchild = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
        "pathlib.Path(sys.argv[1], 'child' + os.environ['RANK']).write_text(str(child.pid))\n"
    )
    process = launcher(tmp_path, script)
    process.wait(timeout=30)
    assert process.returncode == 0
    assert not any(alive(pid) for pid in wait_for(tmp_path, "child0", "child1"))


def test_a_command_stands_for_its_module() -> None:
    assert [module_of(name) for name in ("sft", "grpo", "posttrain.sft")] == [
        "posttrain.sft",
        "posttrain.grpo",
        "posttrain.sft",
    ]
    argv = [sys.executable, "-m", "cli", "launch", "train", "configs/none.toml"]
    launched = subprocess.run(argv, cwd=ROOT, text=True, capture_output=True)
    error = "error: config file configs/none.toml does not exist; presets are under configs/\n"
    assert (launched.returncode, launched.stderr) == (2, error)


COMMANDS = list(ON_RANKS)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "did you mean train?"),
        ("posttrain", f"did you mean {' or '.join(list(TRAINING)[1:])}?"),
        ("pretrain/train.py", "did you mean pretrain.train?"),
        ("posttrain.grop", "did you mean posttrain.grpo?"),
        ("SFT", "did you mean sft?"),
        ("generate", "did you mean export.generate?"),
        ("trivium", "leave out the word 'trivium'"),
        ("datarun", "`trivium data run CONFIG` is one process on one machine"),
        ("no.such.module", f"give {', '.join(COMMANDS)}, or a module"),
        ("", f"give {', '.join(COMMANDS)}, or a module"),
    ],
)
def test_what_cannot_be_launched_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be started as ranks.*" + re.escape(hint)) as raised:
        ranks.main([name, "configs/pretrain/demo.toml"])
    for told in re.findall(r"(?:give|mean|or) ([a-z.]+)(?=[,? ]|$)", str(raised.value)):
        assert told == "a" or module_of(told) in (*ON_RANKS.values(), "export.generate")  # "or a module"


def test_only_a_command_that_there_is_is_said_to_be_one_process() -> None:
    for words, said in (
        (["data", "rnu", "x.toml"], "`data rnu` is no command that can be launched; did you mean `data run`?"),
        (["recipe", "x.toml"], "did you mean `recipe run`?"),
        (["recipe", "run", "x.toml"], "start it as `trivium recipe run x.toml`"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            ranks.main(words)


STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_STEP_NODELIST": "gpu[4-6]",
}


def test_nodes_are_those_of_the_slurm_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts `trivium launch` once per node, as srun does; it reads nodes from Slurm's variables or its options."""
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    script = (
        "names = 'RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT'.split()\n"
        "pathlib.Path(sys.argv[1], 'rank' + os.environ['RANK']).write_text(' '.join(map(os.environ.get, names)))\n"
    )
    assert launcher(tmp_path, script).wait(30) == 0
    assert (tmp_path / "rank2").read_text() == "2 6 0 gpu4 20007" and (tmp_path / "rank3").exists()
    assert launcher(tmp_path, script, "--nnodes", "1", nproc=1).wait(30) == 0
    assert (tmp_path / "rank0").read_text().startswith("0 1 0 127.0.0.1 ")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "3")
    monkeypatch.setenv("SLURM_NODEID", "0")
    with pytest.raises(ValueError, match=r"srun started `trivium launch` 3 times on this node.*--ntasks-per-node=1"):
        ranks.main(["train", "configs/pretrain/demo.toml"])
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert launcher(tmp_path, script).wait(30) == 0


@pytest.mark.parametrize(
    ("options", "words", "right"),
    [
        (["--nproc-per-node", "0"], "--nproc-per-node 0 .*give 1 or more", ["--nproc-per-node", "1"]),
        (["--nnodes", "0"], "--nnodes 0 .*give 1 or more", ["--nnodes", "1"]),
        (
            ["--nnodes", "2", "--node-rank", "2", "--master-address", "a"],
            "--node-rank 2 .*from 0 to 1",
            ["--node-rank", "1"],
        ),
        (["--nnodes", "2"], "needs --master-address", ["--master-address", "127.0.0.1"]),
    ],
)
def test_impossible_worlds_are_refused(tmp_path: Path, options: list[str], words: str, right: list[str]) -> None:
    with pytest.raises(ValueError, match=words):
        ranks.main(["--nproc-per-node", "2", *options, "train"])
    assert launcher(tmp_path, "", *options, *right).wait(30) == 0


def test_logs_of_ranks_are_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").write_text("no folder")
    (tmp_path / "roomy").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    with pytest.raises(ValueError, match=r"cannot be written to .*; make room there, or set TMPDIR to a folder"):
        ranks.main(["--nproc-per-node", "1", "this"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "roomy"))
    assert ranks.main(["--nproc-per-node", "1", "this"]) == 0


IN_OWN_NETWORK = ("unshare", "--user", "--map-root-user", "--net")
NO_PORT = """
import contextlib, io, socket, sys
from pathlib import Path
from launch import ranks
Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("10001 10001")
held = [socket.socket() for _ in range(2)]
for port, one in zip((10_000, 10_001), held):
    one.bind(("", port))
try:
    ranks.main(["this"])
except ValueError as error:
    print(error)
assert ranks.main(["--master-port", "12345", "this"]) == 0
for one in held:
    one.close()
assert ranks.main(["this"]) == 0
"""


@pytest.mark.skipif(
    subprocess.run([*IN_OWN_NETWORK, "true"], capture_output=True).returncode != 0,
    reason="this system lets no user make a network of his own",
)
def test_without_a_free_port_one_that_is_named_is_used() -> None:
    done = subprocess.run(
        [*IN_OWN_NETWORK, sys.executable, "-c", NO_PORT], cwd=ROOT, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "no TCP port is free" in done.stdout and "give --master-port" in done.stdout


def test_a_free_port_is_none_that_the_system_hands_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PORTS_HANDED_OUT", tmp_path / "range")
    (tmp_path / "range").write_text("12000\t60999\n")
    ports = set()
    for _ in range(3):
        random.seed(0)
        ports.add(ranks.free_port())
    assert len(ports) > 1 and all(10_000 <= port < 12_000 for port in ports)
    (tmp_path / "range").write_text("10001\t60999\n")
    with socket.socket() as other:
        other.bind(("", 10_000))
        assert ranks.free_port() > 10_000, "where all below are taken the system is asked"
    (tmp_path / "range").write_text("1024\t60999\n")
    assert ranks.free_port() >= 1024


@pytest.mark.parametrize(
    "options",
    [[], ["--on", "slurm", "--job-dir", "job"], ["--on", "mpi"], ["--on", "torchrun", "--set", "hosts=['a']"]],
)
def test_a_chat_which_has_no_input_here_is_refused_with_the_command_that_has(options: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"start it as torchrun --nproc-per-node 2 -m export\.chat runs/a parallel\.tp=2$"
    ):
        ranks.main([*options, "--nproc-per-node", "2", "export.chat", "runs/a", "parallel.tp=2"])
