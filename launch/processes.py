"""Processes that live and die together: start, forward signals, wait, leave none behind.

Used for the ranks of one machine (launch/ranks.py) and the stages of the demo (launch/demo.py). Leaves out where
output goes: callers pass file descriptors.

The rules: a first Ctrl-C (or SIGTERM, SIGUSR1, or a closed terminal) is passed on once, so that every process can
finish what it must, and the status is then theirs. A second Ctrl-C kills; another second signal changes nothing, since
Slurm sends a warning, then SIGTERM at the end. When one process fails, the others get a moment to say why and are then
ended.
If this process is itself killed, so are they and the children they left: a rerun never meets a survivor that writes
to its run directory or holds its lock.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, Any

from configs import signals

STOP_SECONDS = 300.0  # from a passed-on signal to SIGKILL: a step may have to end, and a checkpoint to be written
GRACE_SECONDS = 60.0  # from SIGTERM after another's failure to SIGKILL: a checkpoint may be on its way to disk
TWICE_SECONDS = 1.0  # a second Ctrl-C that soon is the same one, which came by two ways
SETTLE_SECONDS = 5.0  # from the first failure to SIGTERM for the rest: they may be about to fail with a reason
_PR_SET_PDEATHSIG = 1
# Waits for the end of its input, which is our end however we came to it, and kills a process group.
_GUARD = 'read _; kill -s KILL -- "-$1"'
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class ProcessGroup:
    """A context in which processes are started and waited for together.

    with ProcessGroup() as group:
        group.start(["python", "-m", "..."])
        status = group.wait()
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.failed: int | None = None  # index of the process that failed first
        self._guards: list[tuple[subprocess.Popen[bytes], int]] = []
        self._signals: list[int] = []
        self._told_to_kill = False
        self._told_at = 0.0
        self._previous: dict[int, Any] = {}
        self._elsewhere = signals.elsewhere()

    def __enter__(self) -> "ProcessGroup":
        for number in signals.SAVING:
            self._previous[number] = signal.signal(number, self._on_signal)
        self._elsewhere.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._send(signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for guard, lifeline in self._guards:
            os.close(lifeline)
            guard.wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._elsewhere.__exit__(None, None, None)

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        output: IO[bytes] | int | None = None,
        held_back: bool = False,
    ) -> subprocess.Popen[bytes]:
        """Starts one process; `output` takes stdout and stderr (default: ours).

        With `held_back`, signals wait until the process lets them through, as launch/bootstrap.py does once it
        answers them: none finds it half started.

        Each has a session of its own, so that a Ctrl-C at the terminal reaches it once, by way of us.
        """
        process = subprocess.Popen(
            list(argv),
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_hold_back if held_back else die_with_parent,
        )
        self.processes.append(process)
        self._guard(process.pid)
        return process

    def _guard(self, group: int) -> None:
        """Starts a shell that outlives us by a moment: it kills what is left of the group once we are gone."""
        theirs, lifeline = os.pipe()
        quiet = subprocess.DEVNULL
        command = ["/bin/sh", "-c", _GUARD, "sh", str(group)]
        guard = subprocess.Popen(command, stdin=theirs, stdout=quiet, stderr=quiet, start_new_session=True)
        os.close(theirs)
        self._guards.append((guard, lifeline))

    def wait(self) -> int:
        """Blocks until all have ended. Returns 0 or the first failure's exit status.

        After a signal: the status on which all agree (they may have saved and said so, or have been finished before
        it), else 128 + the signal.
        """
        passed_on = False
        deadline: float | None = None
        ending = False
        while any(process.poll() is None for process in self.processes):
            if self._signals and not passed_on:
                self._send(self._signals[0])
                passed_on, ending, deadline = True, True, time.monotonic() + STOP_SECONDS
            if self._told_to_kill:
                self._send(signal.SIGKILL)
            if self.failed is None and not self._signals:
                self.failed = self._first_failure()
                if self.failed is not None:
                    deadline = time.monotonic() + SETTLE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self._send(signal.SIGKILL if ending else signal.SIGTERM)
                ending, deadline = True, time.monotonic() + GRACE_SECONDS
            time.sleep(0.05)
        if self._signals:
            statuses = {exit_status(process.returncode) for process in self.processes}
            return statuses.pop() if len(statuses) == 1 else 128 + self._signals[0]
        if self.failed is None:
            self.failed = self._first_failure()
        return 0 if self.failed is None else exit_status(self.processes[self.failed].returncode)

    @property
    def signal(self) -> int:
        """The first signal that came; 0 for none."""
        return self._signals[0] if self._signals else 0

    def _first_failure(self) -> int | None:
        codes = [process.poll() for process in self.processes]
        return next((index for index, code in enumerate(codes) if code), None)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is not None:
                continue
            if number == signal.SIGKILL:
                os.killpg(process.pid, number)
            else:  # a process passes other signals on to its children as it sees fit
                process.send_signal(number)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in self._signals:
            self._told_to_kill |= time.monotonic() - self._told_at > TWICE_SECONDS
        self._signals.append(number)
        self._told_at = time.monotonic()


def exit_status(returncode: int) -> int:
    """A Popen return code as a shell's: death by signal n is 128 + n."""
    return returncode if returncode >= 0 else 128 - returncode


def cores() -> int:
    """The cores this process may use: its affinity where the system has one, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _hold_back() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SAVING)
    die_with_parent()


def die_with_parent() -> None:
    """For Popen's preexec_fn: asks Linux to kill this process when the one that started it dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
