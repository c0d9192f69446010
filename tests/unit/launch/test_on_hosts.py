"""Commands of `trivium launch --on torchrun` and `--on mpi`, word by word, and the other side of an ssh connection."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.launch import LaunchConfig
from configs.loader import ConfigError
from launch import ranks
from launch.launched_command import LaunchedCommand
from launch.on_mpi import mpirun_words
from launch.on_torchrun import torchrun_words

ROOT = Path(__file__).resolve().parents[3]
DEMO = str(ROOT / "configs/pretrain/demo.toml")
COMMAND = LaunchedCommand("train", "pretrain.train", ("a b.toml", "run.dir=l'été"), Path("x"), True, True)


def test_the_command_of_torchrun_is_printed_for_each_node(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--on", "torchrun", "--nnodes", "2", "--nproc-per-node", "4", "--master-address", "gpu0"]
    assert ranks.main([*given, "train", DEMO, "train.global_batch_size=8", "run.dir=a b"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[::2] == ["# node 0", "# node 1"]
    first, second = (shlex.split(line) for line in said[1::2])
    after = ["--max-restarts", "0", "--shutdown-timeout", "300", "-m", "pretrain.train", DEMO]
    assert first[-9:] == second[-9:] == [*after, "train.global_batch_size=8", "run.dir=a b"]
    meeting = ["--nnodes", "2", "--nproc-per-node", "4", "--rdzv-backend", "c10d", "--rdzv-endpoint", "gpu0:29500"]
    assert first[3:11] == second[3:11] == meeting
    assert "is_host=1" in first and "is_host=0" in second


def test_hosts_have_their_own_addresses() -> None:
    config = LaunchConfig(hosts=("me@10.0.0.1", "me@10.0.0.2"), port=3, python="python", max_restarts=2)
    words = torchrun_words(COMMAND, config, 1, None)
    assert words[words.index("--rdzv-endpoint") + 1] == "10.0.0.1:3"
    assert words[words.index("--local-addr") + 1] == "10.0.0.2"
    assert words[words.index("--max-restarts") + 1] == "2"
    assert "--standalone" in torchrun_words(COMMAND, LaunchConfig(), 0, None)


def test_mpirun_is_told_hosts_and_names_of_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASKED_FOR", "planted")
    config = LaunchConfig(hosts=("a", "b"), nproc_per_node=8, python="python", environment=("ASKED_FOR", "NOT_SET"))
    open_mpi, mpich = (mpirun_words(COMMAND, config, which) for which in (True, False))
    assert open_mpi[:5] == ["mpirun", "-n", "16", "--host", "a:8,b:8"]
    assert [open_mpi[n + 1] for n, word in enumerate(open_mpi) if word == "-x"][-1] == "ASKED_FOR"
    assert mpich[:7] == ["mpirun", "-n", "16", "-hosts", "a,b", "-ppn", "8"]
    assert mpich[mpich.index("-genvlist") + 1].split(",")[-1] == "ASKED_FOR"
    for words in (open_mpi, mpich):
        assert words[-6:] == ["python", "-m", "launch.mpi_rank", "pretrain.train", "a b.toml", "run.dir=l'été"]
        assert not any("planted" in word for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--on", "torchrun", "--nnodes", "2", "train", DEMO], "needs --master-address, the host of node 0"),
        (["--on", "torchrun", "export", str(ROOT / "configs/export/demo.toml")], "is one process and has no ranks"),
        (["--on", "mpi", "--nnodes", "2", "train", DEMO], "needs the machines for mpirun: set hosts"),
        (
            ["--on", "mpi", "export", str(ROOT / "configs/export/demo.toml")],
            "one process, and mpirun would start it",
        ),
        (["--on", "mpi", "--set", 'mpirun=["no-mpirun"]', "train", DEMO], "no-mpirun is not on PATH"),
        (["--on", "mpi", "--set", 'mpirun=["env"]', "train", DEMO], "is neither Open MPI's nor MPICH's"),
        (["--on", "mpi", "--set", "mpirun=[]", "train", DEMO], "[] names no program"),
        (["--on", "local", "--set", 'hosts=["a"]', "train", DEMO], "--on local starts ranks here alone"),
        (["--on", "local", "--after", "3", "train", DEMO], "--after is for --on slurm"),
        (["data", "run", str(ROOT / "configs/data/demo.toml")], "start it as `trivium data run "),
    ],
)
def test_what_cannot_be_started_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ranks.main(arguments)
    assert words in str(raised.value)


REMOTE = """
import os, pathlib, signal, sys, time
there = pathlib.Path(sys.argv[1])
def stop(number, frame):
    (there / "got").write_text(str(number))
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
(there / "up").write_text(os.getcwd() + " " + os.environ["PASSED"])
time.sleep(60)
"""


@pytest.mark.parametrize(("sent", "got"), [("10\n", signal.SIGUSR1), ("", signal.SIGTERM)])
def test_the_other_side_passes_signals_on_and_stops_when_it_is_left_alone(tmp_path: Path, sent: str, got: int) -> None:
    """Sends the number of a signal, or nothing: the end of the input, as when ssh has been killed."""
    (tmp_path / "folder").mkdir()
    job = {
        "command": [sys.executable, "-c", REMOTE, str(tmp_path)],
        "folder": str(tmp_path / "folder"),
        "environment": {"PASSED": "a 'value'"},
    }
    command = [sys.executable, "-m", "launch.remote"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    deadline = time.monotonic() + 20
    while not ((tmp_path / "up").exists() and (tmp_path / "up").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "up").read_text() == f"{tmp_path / 'folder'} a 'value'"
    if sent:
        process.stdin.write(sent)
        process.stdin.flush()
    else:
        process.stdin.close()
    assert process.wait(20) == 75
    assert (tmp_path / "got").read_text() == str(int(got))
    process.stdin.close()
