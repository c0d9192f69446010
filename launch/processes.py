"""Groups of child processes that are started, signalled, waited for and ended together.

Used for the ranks of one machine (launch/ranks.py) and the stages of a recipe (launch/recipe.py).

- The first Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP is passed on once to every child, so that each can save, and the
  children's exit status is returned.
- A second Ctrl-C kills the children. Any other second signal is ignored, since Slurm sends a warning first and SIGTERM
  at the end.
- When one child fails, the others get `SETTLE_SECONDS` to fail with a message of their own, then SIGTERM.
- If this process is killed, so are its children and theirs: a rerun never finds a surviving process that writes to its
  run directory or holds its lock.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, Any, Self

from configs import signals

STOP_SECONDS = 300.0  # from a passed-on signal to SIGKILL: time to finish a step and write a checkpoint
GRACE_SECONDS = 60.0  # from SIGTERM, after another child failed, to SIGKILL: time to finish writing a checkpoint
TWICE_SECONDS = 1.0  # a second SIGINT within this time is the same Ctrl-C, delivered twice
SETTLE_SECONDS = 5.0  # from the first failure to SIGTERM for the others, which may be about to fail with a reason
_PR_SET_PDEATHSIG = 1
# Shell script of a guard: `read` returns when this process has ended for any reason, then a process group is killed.
_GUARD = 'read _; kill -s KILL -- "-$1"'
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class ProcessGroup:
    """Context manager that starts child processes, waits for all, and on exit kills those that are left.

    with ProcessGroup() as group:
        group.start(["python", "-m", "..."])
        status = group.wait()
    """

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self.failed: int | None = None  # index of the process that failed first
        self._guards: list[tuple[subprocess.Popen[bytes], int]] = []
        self._signals: list[int] = []
        self._kill_requested = False
        self._last_signal_at = 0.0
        self._previous: dict[int, Any] = {}
        self._suspended = signals.suspended()

    def __enter__(self) -> Self:
        for number in signals.SAVING:
            self._previous[number] = signal.signal(number, self._on_signal)
        self._suspended.__enter__()
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
        self._suspended.__exit__(None, None, None)

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        output: IO[bytes] | int | None = None,
        signals_blocked: bool = False,
        stdin: int = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """Starts one process whose stdout and stderr go to `output`, by default to this process's own.

        With `signals_blocked`, signals stay pending until the process unblocks them, as launch/bootstrap.py does after
        setting its handlers; so no signal kills a process that is still starting. Each process has a session of its
        own, so that a Ctrl-C at the terminal reaches it only through this process.
        """
        process = subprocess.Popen(
            list(argv),
            env=None if env is None else dict(env),
            stdin=stdin,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_block_signals if signals_blocked else die_with_parent,
        )
        self.processes.append(process)
        self._guard(process.pid)
        return process

    def _guard(self, group: int) -> None:
        """Starts a shell that kills process group `group` as soon as this process has ended."""
        theirs, lifeline = os.pipe()
        quiet = subprocess.DEVNULL
        command = ["/bin/sh", "-c", _GUARD, "sh", str(group)]
        guard = subprocess.Popen(command, stdin=theirs, stdout=quiet, stderr=quiet, start_new_session=True)
        os.close(theirs)
        self._guards.append((guard, lifeline))

    def wait(self) -> int:
        """Waits until all processes have ended and returns 0 or the exit status of the first that failed.

        After a signal, a process that ended as stopped by it (75 or 130) has not failed; that status is returned if no
        process failed.
        """
        passed_on = False
        deadline: float | None = None
        ending = False
        while any(process.poll() is None for process in self.processes):
            if self._signals and not passed_on:
                self._send(self._signals[0])
                passed_on, ending, deadline = True, True, time.monotonic() + STOP_SECONDS
            if self._kill_requested:
                self._send(signal.SIGKILL)
            if self.failed is None and not self._signals:
                self.failed = self._first_failure()
                if self.failed is not None:
                    deadline = time.monotonic() + SETTLE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self._send(signal.SIGKILL if ending else signal.SIGTERM)
                ending, deadline = True, time.monotonic() + GRACE_SECONDS
            time.sleep(0.05)
        statuses = [exit_status(process.returncode) for process in self.processes]
        stopped = (signals.STOPPED, signals.INTERRUPTED) if self._signals else ()
        if self.failed is None or statuses[self.failed] in stopped:
            self.failed = next((index for index, one in enumerate(statuses) if one and one not in stopped), None)
        return max(statuses, default=0) if self.failed is None else statuses[self.failed]

    @property
    def signal(self) -> int:
        """Number of the first signal that this process got; 0 for none."""
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
            else:
                self._pass_on(process, number)

    def _pass_on(self, process: subprocess.Popen[bytes], number: int) -> None:
        """Sends one process a signal; the process itself decides whether to pass it on to its children."""
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)  # a stopped process answers no signal

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in self._signals:
            self._kill_requested |= time.monotonic() - self._last_signal_at > TWICE_SECONDS
        self._signals.append(number)
        self._last_signal_at = time.monotonic()


def exit_status(returncode: int) -> int:
    """Converts a Popen return code to a shell's exit status: death by signal n is 128 + n."""
    return returncode if returncode >= 0 else 128 - returncode


def cores() -> int:
    """Number of cores that this process may use: its CPU affinity where the system has one, else all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _block_signals() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SAVING)
    die_with_parent()


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies; also a preexec_fn for Popen. Does nothing elsewhere."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
