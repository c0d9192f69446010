"""A child process that is asked questions over pipes: a JSON object a line, and another one in reply, in limited time.

It is in a process group of its own, which is ended as a whole. Its standard input and output are not the pipes, so
whatever it prints does no harm.
"""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

TICK = 0.2  # seconds after which an ended process is noticed, if one that it started keeps its pipe open


class ProcessEnded(Exception):
    """Error for a child process that has ended by itself, or that has not replied in time."""


class PipedProcess:
    """A child process, started at once: `command` with the numbers of two pipes, for requests and replies, behind it.

    What it prints goes into `output`, or nowhere.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | int = subprocess.DEVNULL
    ) -> None:
        """Raises OSError if there is no such program."""
        self._read = b""
        theirs_in, self._requests = os.pipe()
        self._replies, theirs_out = os.pipe()
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs_in), str(theirs_out)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs_in, theirs_out),
                start_new_session=True,
                env=dict(environment),
            )
        except OSError:
            self._close_pipes()
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        os.set_blocking(self._requests, False)

    @property
    def runs(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def exchange(self, content: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Sends one object and returns the reply. Raises ProcessEnded if there is none in time."""
        deadline, unsent = time.monotonic() + seconds, memoryview(json.dumps(content).encode() + b"\n")
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        poll.register(self._requests, select.POLLOUT)
        received = bytearray(self._read)
        while b"\n" not in received[-65536:]:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ProcessEnded(f"took more than {seconds:g} s")
            over = not self.runs  # asked before reading, so that nothing it wrote is missed
            ready = dict(poll.poll(1 if over else min(left, TICK) * 1000 + 1))
            if self._replies in ready:
                part = os.read(self._replies, 65536)
                received += part
                over = over or not part
            elif unsent and self._requests in ready:
                try:
                    unsent = unsent[os.write(self._requests, unsent) :]
                except BrokenPipeError:
                    over = True
                if not unsent:
                    poll.unregister(self._requests)
                continue
            if over and b"\n" not in received[-65536:]:
                raise ProcessEnded("ended its process")
        line, _, self._read = bytes(received).partition(b"\n")
        try:
            reply: dict[str, Any] = json.loads(line)
        except ValueError:
            raise ProcessEnded("wrote to the pipe of its replies") from None
        return reply

    def close(self) -> None:
        """Ends the process and all that it started in its group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        os.close(self._requests)
        os.close(self._replies)
