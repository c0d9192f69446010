"""The trainer's side of an environment of the package verifiers: a process that has it loaded, and episodes in it."""

import atexit
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("verifiers_child.py")
START_SECONDS = 300.0  # for verifiers to load, and the problems, on a busy machine
LOOPBACK = "127.0.0.1,localhost"


class EpisodeEnded(Exception):
    """Error for an episode whose process has ended, or has not replied in time."""


class VerifiersProcess:
    """The process that has a taskset loaded; it is started when needed, and again after it has ended."""

    def __init__(self, taskset: str, env: Mapping[str, Any], max_problems: int, memory_bytes: int) -> None:
        """`env` is what a config of verifiers has under [env]."""
        self._setup = {"taskset": taskset, "env": env, "max_problems": max_problems, "memory_bytes": memory_bytes}
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._starting, self._numbers = threading.Lock(), itertools.count()
        atexit.register(self.close)

    def load(self) -> dict[str, Any]:
        """Starts the process, and returns {"problems", "rewards"}, or {"error"} if they cannot be loaded."""
        self.close()
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._folder = tempfile.TemporaryDirectory(prefix="trivium-episodes-")
        proxies = {name: f"{os.environ.get(name, '')},{LOOPBACK}".lstrip(",") for name in ("NO_PROXY", "no_proxy")}
        errors = Path(self._folder.name, "errors")
        with errors.open("wb") as said, control:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-B", str(CHILD), str(control.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                pass_fds=(control.fileno(),),
                start_new_session=True,
                env={**os.environ, **proxies, "OMP_NUM_THREADS": "1"},
            )
        path = [os.getcwd(), *(os.path.abspath(part) for part in sys.path)]
        setup = {**self._setup, "path": list(dict.fromkeys(path)), "folder": self._folder.name}
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [json.dumps(setup).encode()], [theirs.fileno()])
        with ours:
            try:
                return _next(ours, b"", START_SECONDS)[0]
            except EpisodeEnded as ended:
                last = errors.read_text(errors="replace").strip().splitlines()[-1:]
                self.close()
                return {"error": ": ".join([f"its process, when it loaded the problems, {ended}", *last])}

    def begin(self, index: int) -> "VerifiersEpisode":
        """Begins an episode with problem number `index`. Raises EpisodeEnded if the process cannot be started."""
        with self._starting:
            over = self._process is None or self._process.poll() is not None
            if over and "error" in (found := self.load()):
                raise EpisodeEnded(f"cannot be loaded any more: {found['error']}")
            number = next(self._numbers)
            ours, theirs = socket.socketpair()
            with theirs:
                self._send({"index": index, "number": number}, theirs.fileno())
        return VerifiersEpisode(self, number, ours)

    def end(self, number: int) -> None:
        """Ends the process of an episode, if it has not ended."""
        with suppress(EpisodeEnded), self._starting:
            self._send({"end": number})

    def _send(self, content: Mapping[str, Any], *fds: int) -> None:
        assert self._control is not None
        try:
            socket.send_fds(self._control, [json.dumps(content).encode()], fds)
        except OSError as error:
            raise EpisodeEnded(f"has lost its process: {error}") from None

    def close(self) -> None:
        """Ends the process; it ends those of the episodes, which see their sockets close, too."""
        if self._process is None:
            return
        assert self._control is not None and self._folder is not None
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = self._control = None
        with suppress(OSError):
            self._folder.cleanup()


class VerifiersEpisode:
    """An episode that has begun: what its environment says next, first and after each answer."""

    def __init__(self, process: VerifiersProcess, number: int, replies: socket.socket) -> None:
        self._process, self._number, self._replies, self._read = process, number, replies, b""

    def next(self, answer: str | None, seconds: float) -> dict[str, Any]:
        """Returns {"messages"} to be answered, {"value", "parts"} or {"reason", "detail"}, and ends the episode after.

        Raises EpisodeEnded if there is none of them within `seconds`.
        """
        try:
            if answer is not None:
                self._replies.sendall(json.dumps({"answer": answer}).encode() + b"\n")
            reply, self._read = _next(self._replies, self._read, seconds)
        except (OSError, EpisodeEnded) as error:
            self.close()
            raise error if isinstance(error, EpisodeEnded) else EpisodeEnded("ended its process") from None
        return reply

    def close(self) -> None:
        """Ends the episode's process, if it has not ended."""
        if self._replies.fileno() >= 0:
            self._replies.close()
            self._process.end(self._number)


def _next(replies: socket.socket, read: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
    """Returns the next reply, and what was read beyond it. Raises EpisodeEnded if there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    while b"\n" not in read:
        left = deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            replies.settimeout(left)
            part = replies.recv(65536)
        except TimeoutError:
            raise EpisodeEnded(f"took more than {seconds:g} s") from None
        except OSError:
            part = b""
        if not part:
            raise EpisodeEnded("ended its process")
        read += part
    line, _, rest = read.partition(b"\n")
    reply: dict[str, Any] = json.loads(line)
    return reply, rest
