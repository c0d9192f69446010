"""Jobs of `trivium launch --on slurm` in the tests' own Slurm cluster, and what they printed."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PASSED = ["GLOO_SOCKET_IFNAME", "HF_HUB_OFFLINE", "MASTER_ADDR", "OMP_NUM_THREADS", "PYTHONPATH", "SLURM_CONF"]
# The environment that a job needs here, since both nodes are this machine and their names cannot be resolved.
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
# One core for each node's launcher: on two machines each would have all cores of its own.
NODE = (f"environment={json.dumps(PASSED)}", 'wrapper=["taskset", "-c", "0"]')


def launch(
    *words: str, options: tuple[str, ...] = (), env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Runs `trivium launch --on slurm` on two nodes of one rank, with further options, and returns what it printed."""
    settings = [word for setting in NODE for word in ("--set", setting)]
    command = [sys.executable, "-m", "cli", "launch", "--on", "slurm", "--nnodes", "2", *settings, *options, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **(env or {})})


class Job:
    """A submitted job by its number, and its output."""

    def __init__(self, number: str, output: Path) -> None:
        self.number, self.output = number, output

    @classmethod
    def submitted(cls, *words: str, options: tuple[str, ...] = (), env: Mapping[str, str] | None = None) -> "list[Job]":
        """Launches a command and returns its jobs."""
        done = launch(*words, options=options, env=env)
        assert done.returncode == 0, done.stderr
        found = re.findall(r"submitted job (\d+).*\n  its output: (.*)\n", done.stdout)
        assert found, done.stdout
        return [cls(number, Path(output)) for number, output in found]

    def cancel(self, *options: str) -> None:
        subprocess.run(["scancel", *options, self.number], check=True)

    def warn(self) -> None:
        """Sends the signal that the script's `--signal` option sends before the time limit."""
        self.cancel("--signal=USR1", "--batch")

    def shows(self, key: str) -> str:
        done = subprocess.run(["scontrol", "show", "job", self.number], capture_output=True, text=True, check=True)
        found = re.search(rf"\b{key}=(\S+)", done.stdout)
        assert found is not None, done.stdout
        return found[1]

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_for(self, what: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{self.shows('JobState')}\n{self.said()[-5000:]}"
            time.sleep(0.1)

    def wait_for_state(self, state: str) -> None:
        self.wait_for(lambda: self.shows("JobState") == state)
