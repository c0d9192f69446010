"""A training run that a drill starts through `trivium launch`, watches from outside, and breaks.

It is watched by its files and processes alone: the lines of metrics.jsonl, what the launchers print, and the processes
of the ranks. Linux only.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.processes import ProcessGroup, exit_status
from launch.ranks import free_port
from pretrain.logs.metrics_file import read_metrics

PATIENCE = 1800.0  # seconds that a start, a step or an end may take
POLL_SECONDS = 0.003
GOING_ON = re.compile(r"going on from .*step_(\d+)$", re.MULTILINE)
SAID = re.compile(r"(?:error|warning): .*")


class DrillError(Exception):
    """Error for a run that did not come as far as a drill needs."""


class DrilledRun:
    """The run in a folder: its starts, one after another, and what is known of them.

    `config` is the file of its config, and `ranks` the number of its ranks.
    """

    def __init__(self, config: Path, folder: Path, ranks: int, group: ProcessGroup, progress: Callable[[str], None]):
        self.config, self.folder, self.ranks = config, folder, ranks
        self._group, self._progress = group, progress
        self.command = "train"
        self._starts = 0
        self._processes: dict[int, int] = {}
        self._launchers: list[subprocess.Popen[bytes]] = []
        self._logs: list[Path] = []
        self._log_of_steps = -1  # the inode of metrics.jsonl before the last start, which each start replaces
        self._shown = ""
        self._read: tuple[tuple[int, int, int], int] = (0, 0, 0), 0  # what metrics.jsonl was, and its last step

    def beside(self, name: str) -> "DrilledRun":
        """Returns another run of the same config and ranks, in a folder of this one's."""
        return DrilledRun(self.config, self.folder / name, self.ranks, self._group, self._progress)

    def start(
        self, nodes: int = 1, module: str = "", before: Sequence[str] = (), overrides: Sequence[str] = ()
    ) -> None:
        """Starts the run, or goes on with it: by one launcher, or by one for each of several nodes.

        A `module` takes the place of the command; `before` are words between it and the config.
        """
        self._starts += 1
        self._log_of_steps = _inode(self._metrics)
        port, self._launchers, self._logs, self._processes = str(free_port()), [], [], {}
        per_node = str(self.ranks // nodes)
        self.folder.mkdir(parents=True, exist_ok=True)
        for node in range(nodes):
            launch = [sys.executable, "-m", "launch.ranks", "--nproc-per-node", per_node]
            if nodes > 1:
                launch += ["--nnodes", str(nodes), "--node-rank", str(node)]
                launch += ["--master-address", "127.0.0.1", "--master-port", port]
            words = [module or self.command, *before, str(self.config), f"run.dir={self.run_dir}", *overrides]
            self._logs.append(self.folder / f"start_{self._starts}{f'_node_{node}' if nodes > 1 else ''}.log")
            with self._logs[-1].open("wb") as log:
                self._launchers.append(self._group.start([*launch, *words], os.environ, output=log))
            if nodes > 1:  # before it starts its ranks, which so have as many threads as those of one launcher
                os.sched_setaffinity(self._launchers[-1].pid, share_of_node(os.sched_getaffinity(0), node, nodes))

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def _metrics(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        try:
            found = self._metrics.stat()
        except OSError:
            return 0
        if self._read[0] != (seen := (found.st_ino, found.st_size, found.st_mtime_ns)):
            records = read_metrics(self._metrics).records
            self._read = seen, max((one["step"] for one in records if "loss" in one), default=0)
        return self._read[1]

    @property
    def steps_saved(self) -> list[int]:
        """The steps of the checkpoints, ascending."""
        found = (self.run_dir / "checkpoints").glob("step_*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step_")) for path in found)

    @property
    def output(self) -> str:
        """The output of the launchers of the last start."""
        return "".join(log.read_text(encoding="utf-8", errors="replace") for log in self._logs)

    @property
    def sentences(self) -> list[str]:
        """The errors and warnings that the last start has printed, each once."""
        return list(dict.fromkeys(found.group().strip() for found in SAID.finditer(self.output)))

    @property
    def went_on_from(self) -> int:
        """The step of the checkpoint that the last start went on from; 0 if it began anew."""
        found = GOING_ON.findall(self.output)
        return int(found[-1]) if found else 0

    @property
    def processes(self) -> dict[int, int]:
        """The process of each rank of the last start, by rank; they are looked for once, when all are there."""
        if len(self._processes) < self.ranks:
            self._processes = self._found()
        return self._processes

    def _found(self) -> dict[int, int]:
        launchers = {str(process.pid) for process in self._launchers}
        found: dict[int, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "stat").read_text().rpartition(")")[2].split()[1] in launchers:
                    variables = (folder / "environ").read_bytes().split(b"\0")
                    found |= {int(one[5:]): int(folder.name) for one in variables if one.startswith(b"RANK=")}
            except OSError:  # it has ended
                continue
        return found

    def wait_for_step(self, step: int, saved: int = 0) -> None:
        """Waits until the run has done a step, and saved the checkpoint of another. Raises DrillError if it ends."""
        self._wait("step 1", lambda: self.step > 0)
        _ = self.processes  # so that a fault comes at once
        self._wait(f"step {step}", lambda: self.step >= step and (not saved or saved in self.steps_saved))

    def wait_for_first_step(self) -> None:
        """Waits for the first step of the last start. Raises DrillError if the run ends before."""

        def begun() -> bool:
            return _inode(self._metrics) not in (-1, self._log_of_steps) and self.step > self.went_on_from

        self._wait("its first step", begun)

    def wait(self) -> list[int]:
        """Waits until all launchers have ended, and returns their exit statuses."""
        deadline = time.monotonic() + PATIENCE
        while any(process.poll() is None for process in self._launchers):
            self._pause(deadline, "its end")
        return [exit_status(process.returncode) for process in self._launchers]

    def end(self) -> None:
        """Kills what still runs of the last start."""
        for process in self._launchers:
            if process.poll() is None:
                process.kill()
                process.wait()

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one rank."""
        processes = self.processes
        try:
            os.kill(processes[rank], number)
        except (KeyError, ProcessLookupError):
            raise DrillError(f"rank {rank} was over before it could be sent {signal.Signals(number).name}") from None

    def kill_node(self, node: int) -> None:
        """Kills the launcher of a node and all of its ranks at once."""
        per_node = self.ranks // len(self._launchers)
        self._launchers[node].send_signal(signal.SIGSTOP)  # so that it does not answer the death of its ranks
        for rank, process in self.processes.items():
            if rank // per_node == node:
                os.kill(process, signal.SIGKILL)
        self._launchers[node].kill()

    def _wait(self, what: str, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            if all(process.poll() is not None for process in self._launchers) and not until():
                statuses = [exit_status(process.returncode) for process in self._launchers]
                raise DrillError(f"the run ended with {_joined(statuses)} before {what}, at step {self.step}")
            self._pause(deadline, what)

    def _pause(self, deadline: float, what: str) -> None:
        if self._group.signal:
            raise KeyboardInterrupt
        if time.monotonic() > deadline:
            raise DrillError(f"{what} has not come in {PATIENCE / 60:.0f} minutes")
        text = f"start {self._starts}, step {self.step}"
        if text != self._shown:
            self._shown = text
            self._progress(text)
        time.sleep(POLL_SECONDS)


def share_of_node(cores: set[int], node: int, nodes: int) -> list[int]:
    """Returns the cores of one of several nodes that share a machine: as many for each, or all if there are too few."""
    size = len(cores) // nodes
    return sorted(cores)[node * size : (node + 1) * size] or sorted(cores)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return -1


def _joined(statuses: Sequence[int]) -> str:
    return f"status{'es' if statuses[1:] else ''} {' and '.join(map(str, statuses))}"
