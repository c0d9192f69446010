"""Commands that train with one rank or two, started by each launcher, and the processes that they leave."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.small_training import last_step

ROOT = Path(__file__).resolve().parents[2]
CLI = (sys.executable, "-m", "cli")
TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "-m", "pretrain.train")
# As in jobs of Slurm: signals stay pending in a process until it has set its handlers.
HELD_BACK = ("env", "--block-signal=INT,TERM,HUP,USR1")
# A shell ignores SIGINT in a command that it starts in the background, which the tests would hand on.
NOT_IGNORED = ("env", "--default-signal=INT,HUP")
TRAINING = {
    "alone": (*CLI, "train"),
    "launch": (*CLI, "launch", "--nproc-per-node", "2", "train"),
    "mpirun": (str(Path(sys.executable).with_name("mpirun")), "-n", "2", *CLI, "train"),
}


class Command:
    """A running command; a variable in its environment marks it and its children."""

    def __init__(self, folder: Path, argv: Sequence[str]):
        self.log, self.mark = folder / "log", f"INTERRUPTED_TEST={folder}"
        name, _, value = self.mark.partition("=")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*NOT_IGNORED, *argv],
                cwd=ROOT,
                env={**os.environ, name: value, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self, number: int, seconds: float = 60) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()

    def survivors(self, seconds: float = 60) -> list[str]:
        """Waits up to `seconds` for all its processes to end; returns the command lines of those that are left."""
        deadline = time.monotonic() + seconds
        while (left := list(self._left())) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def ranks(self) -> list[int]:
        """Returns the process ids of the ranks that a launcher has started."""
        started = [(pid, line.split()) for pid, line in self._processes() if pid != self.process.pid]
        return [pid for pid, words in started if words and Path(words[0]).name.startswith(("python", "env"))]

    def _left(self) -> list[str]:
        return [line for _, line in self._processes()]

    def _processes(self) -> Iterator[tuple[int, str]]:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    yield int(folder.name), (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def wait_for_step(command: Command, run: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while last_step(run) < step:
        assert time.monotonic() < deadline and command.process.poll() is None, command.said()
        time.sleep(0.05)
