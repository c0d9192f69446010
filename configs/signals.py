"""What signals do to a process of ours, from its first line to its last.

Ctrl-C interrupts any command: a KeyboardInterrupt in the main thread, and some seconds for cleaning up. A command that
saves (training) also answers SIGTERM, SIGUSR1 (Slurm's `--signal`) and SIGHUP, by where it is:

- It begins, up to its first whole step: there is nothing to save, and it ends at once, be it importing, waiting for
  other ranks, reading a checkpoint or compiling.
- It works: the signal is noted, and the training loop saves and ends.
- It ends: nothing changes any more.

A thread reads the signals (`signal.set_wakeup_fd`), since the main thread may be in compiled code for minutes, where no
handler of Python's is called. The same thread looks whether the launcher is still there: ranks whose launcher is gone
save and end as on SIGTERM. What it leaves out: passing signals on to other processes, see launch/processes.py.

Imports nothing that takes time: it is there before everything else.
"""

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

# The exit status of a run that was told to stop and has lost nothing: start the same command again. sysexits.h calls it
# EX_TEMPFAIL; no shell and no signal uses it.
STOPPED = 75
INTERRUPTED = 130
SAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # what a command that saves answers to
AGAIN = "run the same command again to go on"

ORPHAN_SECONDS = 300.0  # from the launcher's end to that of its ranks: they may have a step and a save to finish
CLEANUP_SECONDS = 15.0  # from a Ctrl-C to the end of a command that does not save
AGREEMENT_SECONDS = 10.0  # from a signal to the end of a rank that waits for others after its first step
ECHO_SECONDS = 2.0  # how much later a signal may reach this rank than one whose end it has felt
_POLL_SECONDS = 0.5


class Phase(enum.Enum):
    BEGINS = enum.auto()
    AGREES = enum.auto()  # has done its first step and waits for the others' word
    WORKS = enum.auto()
    ENDS = enum.auto()


class Watch:
    """The signals of one process. Made in the main thread, one at a time.

    `saves`: see above. `speaks`: whether it says so when it ends at once; one of many ranks does. `launched`: whether a
    launcher started it, so that it ends with its parent.
    """

    def __init__(self, saves: bool, speaks: bool = True, launched: bool = False):
        self.saves, self.speaks, self.launched = saves, speaks, launched
        self.number = 0  # the first signal; 0 for none
        self.phase = Phase.BEGINS
        self._raised = self._orphaned = False
        self._elsewhere = 0
        self._deadline: float | None = None
        self._listeners: list[Callable[[], None]] = []
        self._lock, self._leaving = threading.Lock(), threading.Lock()
        self._parent = os.getppid()
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous: dict[int, Any] = {}
        for number in SAVING if saves else (signal.SIGINT,):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._handle)
        self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="signals", daemon=True)
        self._thread.start()
        # Who starts this process may have signals held back (blocked), so that none kills it on the way to here: our
        # launchers, launch/slurm, or anybody with `env --block-signal=INT,TERM,HUP,USR1`.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SAVING)

    def when_told(self, listener: Callable[[], None]) -> None:
        """Calls `listener`, from another thread, when the first signal is noted while it works."""
        self._listeners.append(listener)

    def agree(self) -> None:
        """The first step is done: from here on signals are noted, and what is done about them is agreed on."""
        with self._lock:
            if self.phase is Phase.BEGINS:
                self.phase = Phase.AGREES

    def work(self) -> None:
        """All ranks have done their first step."""
        with self._lock:
            if self.phase is not Phase.AGREES:
                return
            self.phase = Phase.WORKS
            self._deadline = time.monotonic() + ORPHAN_SECONDS if self._orphaned else None
        if self.number:
            self._tell_listeners()

    def end(self) -> None:
        """What is to be done about signals is done."""
        with self._lock:
            self.phase, self._deadline = Phase.ENDS, None

    def begin_again(self) -> None:
        """Something failed before there was anything to save: a signal that comes now ends it at once."""
        with self._lock:
            if self.phase is Phase.AGREES:
                self.phase = Phase.BEGINS
                if self.number:
                    self._leave()

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Other handlers are set, and do what is to be done."""
        self._elsewhere += 1
        try:
            yield
        finally:
            self._elsewhere -= 1

    def close(self, ignore: bool = False) -> None:
        """Puts handlers back as they were, or, in a process that ends now, ignores the signals."""
        self.end()
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():  # None: it was not set from Python and cannot be put back
            signal.signal(number, signal.SIG_IGN if ignore else handler or signal.SIG_DFL)
        self._write.close()  # ends the thread

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self.saves and self.phase is Phase.WORKS and not self._raised:
            self._raised = True
            raise KeyboardInterrupt
        if self.phase is Phase.BEGINS and not self._elsewhere:  # the thread may not be there yet, or look too late
            self.number = self.number or number
            self._leave()

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
                            self._told(number)
                if self.launched and os.getppid() != self._parent:
                    self.launched, self._orphaned = False, True
                    self._told(signal.SIGTERM, ORPHAN_SECONDS)
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._leave()
        finally:
            self._read.close()

    def _told(self, number: int, seconds: float | None = None) -> None:
        """Does what the phase asks for; in `seconds` at the latest the process has ended."""
        with self._lock:
            if self._elsewhere:
                return
            first, self.number = not self.number, self.number or number
            if self.phase is Phase.BEGINS:
                self._leave()
            if self.phase is Phase.AGREES:
                seconds = AGREEMENT_SECONDS
            elif not self.saves:
                seconds = CLEANUP_SECONDS
            if seconds is not None:
                self._deadline = self._deadline or time.monotonic() + seconds
            working = self.phase is Phase.WORKS
        if first and working:
            self._tell_listeners()

    def _tell_listeners(self) -> None:
        for listener in self._listeners:
            listener()

    def _leave(self) -> None:
        """Ends the process from this thread, whatever the others are at."""
        if not self._leaving.acquire(blocking=False):
            return
        if self.speaks:
            name = signal.Signals(self.number).name
            said = f"stopped by {name} before the first step was done" if self.saves else "interrupted"
            with contextlib.suppress(OSError):
                os.write(2, f"{said}; {AGAIN}\n".encode())
        flush = threading.Thread(target=_flush, daemon=True)  # it may have to wait for the main thread, forever
        flush.start()
        flush.join(1.0)
        os._exit(status_of(self.number))


_watch: Watch | None = None  # a process has one set of signal handlers, and this is what they belong to


def begin(saves: bool = False, speaks: bool = True, launched: bool = False) -> None:
    """Answers signals from here on; the first thing that a command does. Does nothing the second time."""
    global _watch
    if _watch is None:
        _watch = Watch(saves, speaks, launched)
        os.register_at_fork(after_in_child=_forget)


def run() -> None:
    """A command that does not save has been imported: from here on Ctrl-C is a KeyboardInterrupt."""
    if _watch is not None and not _watch.saves:
        _watch.agree()
        _watch.work()


def let_a_signal_pass() -> None:
    """For a rank that failed before its first step: waits for the signal that may have ended another one before it."""
    if _watch is not None and _watch.launched and _watch.phase in (Phase.BEGINS, Phase.AGREES):
        _watch.begin_again()
        time.sleep(ECHO_SECONDS)


def elsewhere() -> contextlib.AbstractContextManager[None]:
    """While other handlers than those of here are set."""
    return contextlib.nullcontext() if _watch is None else _watch.elsewhere()


def exit(status: int) -> NoReturn:
    """Ends the process; no signal changes its status any more."""
    if _watch is not None:
        _watch.close(ignore=True)
    flush()
    if _watch is not None and _watch.saves:
        os._exit(status)  # all is saved and closed, and Python takes seconds to forget what torch has brought
    # An interruption that met a string being run (imports run many) would, though caught, make `python -m` end as if
    # killed by SIGINT; running another string makes it forget.
    exec("")
    raise SystemExit(status)


def flush() -> None:
    """Writes out what is still buffered; what nobody reads any more (`... | head`) is dropped in silence."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # Python would try again at its end, and complain
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone, in a command that loses nothing by ending then."""
    if _watch is not None and _watch.saves:
        return False
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # POLLERR, the sign of it, is always reported
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file
        return False


@contextlib.contextmanager
def saving() -> Iterator[Watch]:
    """The watch of a command that saves, for the length of its training loop; it has to tell its phases."""
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
    """The exit status of a command that saves and was stopped by signal `number`."""
    return INTERRUPTED if number == signal.SIGINT else STOPPED


def _forget() -> None:
    """In a child that was forked and goes on with Python: what signals do to it is not the parent's affair."""
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
