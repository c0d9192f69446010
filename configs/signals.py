"""Signal handling of every Trivium process, from its first line to its last.

Ctrl-C interrupts any command: it raises KeyboardInterrupt in the main thread, which then has `CLEANUP_SECONDS` to
finish. A command that saves checkpoints (training) also answers SIGTERM, SIGUSR1 (Slurm's `--signal`) and SIGHUP. What
a signal does to it depends on its phase:

- Starting, until all ranks have done their first step: there is nothing to save, so the process ends at once, whether
  it is importing, waiting for other ranks, reading a checkpoint or compiling.
- Running: the signal is noted, and the training loop saves a checkpoint and ends.
- Ending: the signal changes nothing.

A thread reads the signals (`signal.set_wakeup_fd`), since the main thread may be in compiled code for minutes, where
Python calls no signal handler. The same thread checks whether the launcher is still alive: ranks whose launcher has
died save and end as on SIGTERM. Passing signals on to other processes is left to launch/processes.py.

Imports only modules that load fast, because this module is loaded before everything else.
"""

import atexit
import contextlib
import enum
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

# The exit status of a run that was stopped by a signal and lost nothing: running the same command again continues it.
# It is EX_TEMPFAIL of sysexits.h; no shell and no signal uses this status.
STOPPED = 75
# The exit status of a run that its watchdog ended because no rank made progress: running the same command again
# continues it from the last checkpoint. It is EX_PROTOCOL of sysexits.h.
HUNG = 76
# The exit status of a run whose ranks disagree on what they have computed: not to be started again on these machines.
CORRUPTED = 78
INTERRUPTED = 130
SAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # the signals on which a training run saves
AGAIN = "run the same command again to go on"

# The longest time that a process lives after:
ORPHAN_SECONDS = 300.0  # the death of its launcher: a step and a checkpoint may have to be finished
CLEANUP_SECONDS = 15.0  # Ctrl-C, in a command that does not save
AGREEMENT_SECONDS = 10.0  # a signal, in a rank that has done its first step and waits for the other ranks
# When a signal ends another rank first, this rank fails at once, and may get the signal this much later.
ECHO_SECONDS = 2.0
_POLL_SECONDS = 0.5


class Phase(enum.Enum):
    """The part of its life that a process is in, which decides what a signal does to it."""

    STARTING = enum.auto()
    FIRST_STEP_DONE = enum.auto()  # on this rank; other ranks may still be starting
    RUNNING = enum.auto()
    ENDING = enum.auto()


class Watch:
    """Signal handlers of one process and the thread that reads its signals.

    It is made in the main thread, and there is one at a time. `saves` is whether the command saves checkpoints and so
    answers more signals than Ctrl-C. `prints_errors` is whether it prints a message when a signal ends it at once; one
    of many ranks does. `launched` is whether a launcher started the process, so that it ends after its parent died.
    """

    def __init__(self, saves: bool, prints_errors: bool = True, launched: bool = False):
        self.saves, self.prints_errors, self.launched = saves, prints_errors, launched
        self.number = 0  # the first signal that came; 0 for none
        self.phase = Phase.STARTING
        self._raised = self._orphaned = False
        self._suspended = 0
        self._deadline: float | None = None
        self._listeners: list[Callable[[], None]] = []
        self._lock, self._leaving = threading.Lock(), threading.Lock()
        self._parent = os.getppid()
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous: dict[int, Any] = {}
        for number in SAVING if saves else (signal.SIGINT,):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup started this process
            self._previous[number] = signal.signal(number, self._handle)
        self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()
        # Whoever started this process may have blocked these signals, so that none kills it before the handlers are
        # set: `trivium launch`, its Slurm jobs, or a user with `env --block-signal=INT,TERM,HUP,USR1`.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SAVING)

    def on_first_signal(self, listener: Callable[[], None]) -> None:
        """Adds a function to call, in the signals thread or in `work`, once the process is running and has a signal."""
        self._listeners.append(listener)

    def agree(self) -> None:
        """Says that this rank has done its first step; signals are noted from now on, and ranks agree on the answer."""
        with self._lock:
            if self.phase is Phase.STARTING:
                self.phase = Phase.FIRST_STEP_DONE

    def work(self) -> None:
        """Says that all ranks have done their first step, so that a signal now saves a checkpoint."""
        with self._lock:
            if self.phase is not Phase.FIRST_STEP_DONE:
                return
            self.phase = Phase.RUNNING
            self._deadline = time.monotonic() + ORPHAN_SECONDS if self._orphaned else None
        if self.number:
            self._call_listeners()

    def end(self) -> None:
        """Says that the command is ending, so that signals change nothing from now on."""
        with self._lock:
            self.phase, self._deadline = Phase.ENDING, None

    def begin_again(self) -> None:
        """Goes back to starting after a failure before `work`: a signal, noted or to come, ends the process at once."""
        with self._lock:
            if self.phase is Phase.FIRST_STEP_DONE:
                self.phase = Phase.STARTING
                if self.number:
                    self._exit_now()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Ignores signals inside the context, where the caller's own handlers answer them."""
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1

    def close(self, ignore: bool = False) -> None:
        """Restores the previous handlers, or with `ignore`, in a process about to exit, ignores the signals."""
        self.end()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():  # None: not set by Python, so it cannot be restored
            signal.signal(number, signal.SIG_IGN if ignore else handler or signal.SIG_DFL)
        self._write.close()  # ends the thread

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self.saves and self.phase is Phase.RUNNING and not self._raised:
            self._raised = True
            raise KeyboardInterrupt
        if self.phase is Phase.STARTING and not self._suspended:  # the thread may not run yet, or too late
            self.number = self.number or number
            self._exit_now()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        try:
            while True:
                if poll.poll(1000 * _POLL_SECONDS):
                    numbers = self._read.recv(64)
                    if not numbers:
                        return
                    for number in numbers:
                        if number in self._previous:
                            self._note(number)
                if self.launched and os.getppid() != self._parent:
                    self.launched, self._orphaned = False, True
                    self._note(signal.SIGTERM, ORPHAN_SECONDS)
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._exit_now()
        finally:
            self._read.close()

    def _note(self, number: int, seconds: float | None = None) -> None:
        """Answers signal `number` as the phase demands; the process ends within `seconds` at the latest."""
        with self._lock:
            if self._suspended:
                return
            first, self.number = not self.number, self.number or number
            if self.phase is Phase.STARTING:
                self._exit_now()
            if self.phase is Phase.FIRST_STEP_DONE:
                seconds = AGREEMENT_SECONDS
            elif not self.saves:
                seconds = CLEANUP_SECONDS
            if seconds is not None:
                self._deadline = self._deadline or time.monotonic() + seconds
            running = self.phase is Phase.RUNNING
        if first and running:
            self._call_listeners()

    def _call_listeners(self) -> None:
        for listener in self._listeners:
            listener()

    def _exit_now(self) -> None:
        """Ends the process from this thread, whatever its other threads are doing."""
        if not self._leaving.acquire(blocking=False):
            return
        if self.prints_errors:
            name = signal.Signals(self.number).name
            said = f"stopped by {name} before the first step was done" if self.saves else "interrupted"
            with contextlib.suppress(OSError):
                os.write(2, f"{said}; {AGAIN}\n".encode())
        flush = threading.Thread(target=_flush, daemon=True)  # may block forever on the main thread
        flush.start()
        flush.join(1.0)
        os._exit(status_of(self.number))


_watch: Watch | None = None  # of this process: signal handlers are global, so it is too


def begin(saves: bool = False, prints_errors: bool = True, launched: bool = False) -> None:
    """Makes this process's `Watch`, whose arguments it takes; commands call it first. A second call does nothing."""
    global _watch
    if _watch is None:
        _watch = Watch(saves, prints_errors, launched)
        os.register_at_fork(after_in_child=_forget)


def run() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt; called by commands that save no checkpoints, once they are imported."""
    if _watch is not None and not _watch.saves:
        _watch.agree()
        _watch.work()


def was_interrupted() -> bool:
    """Tells whether Ctrl-C raised KeyboardInterrupt, which other code may have caught, and failed by it later."""
    return _watch is not None and _watch._raised


def let_a_signal_pass() -> None:
    """Waits, in a rank that failed before all had done their first step, for a signal that may have ended another rank.

    If it comes, this process ends as stopped by a signal, and not with the failure that the other rank's end caused.
    """
    if _watch is not None and _watch.launched and _watch.phase in (Phase.STARTING, Phase.FIRST_STEP_DONE):
        _watch.begin_again()
        time.sleep(ECHO_SECONDS)


def suspended() -> contextlib.AbstractContextManager[None]:
    """Leaves signals to the caller's own handlers inside the context."""
    return contextlib.nullcontext() if _watch is None else _watch.suspended()


def exit(status: int) -> NoReturn:
    """Ends the process with `status`, which no signal changes any more."""
    if _watch is not None:
        _watch.close(ignore=True)
    flush()
    if _watch is not None and (_watch.saves or status == INTERRUPTED):
        if not _watch.saves:
            atexit._run_exitfuncs()  # ends worker processes and removes temporary folders
        os._exit(status)  # all is saved and closed; unloading torch would take seconds, under load half a minute
    # After a KeyboardInterrupt inside exec (imports use it often), even a caught one, `python -m` ends as if killed by
    # SIGINT. Another exec resets that flag.
    exec("")
    raise SystemExit(status)


def flush() -> None:
    """Flushes stdout and stderr; output whose reader has gone (`... | head`) is dropped in silence."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # Python would flush again at exit, and print an error
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def nobody_reads() -> bool:
    """Tells whether standard output is a pipe whose reader has gone, in a command that does not save."""
    if _watch is not None and _watch.saves:
        return False
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # POLLERR, which says so, is reported without asking
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # stdout is not a file
        return False


@contextlib.contextmanager
def saving() -> Iterator[Watch]:
    """Yields the `Watch` of a training run around its loop, which calls `agree`, `work` and `end` as it goes on."""
    if _watch is not None and _watch.saves:
        yield _watch
        _watch.end()
        return
    own = Watch(saves=True)
    try:
        yield own
    finally:
        own.close()


def status_of(number: int) -> int:
    """Exit status of a training run that was stopped by signal `number`."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


def _forget() -> None:
    """Restores default handlers in a forked child that goes on in Python, so that the parent's do not act there."""
    global _watch
    if _watch is not None:
        signal.set_wakeup_fd(-1)
        for number in _watch._previous:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _watch = None


def _flush() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
