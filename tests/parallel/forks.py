"""Starts ranks by forking a process that has imported everything, so that a rank starts in a tenth of a second.

That process, the fork server, never computes and opens no port, so that its forks start clean and with one thread. It
takes requests as lines of JSON over a Unix socket, one at a time, and answers each with a line: "fork" starts a
process that calls a function, "status" returns the exit status of one. `Forks` is the client, `Fork` one process.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from launch.processes import die_with_parent

REPOSITORY = Path(__file__).resolve().parents[2]
FAILED = 70  # the exit status of a function that raised
# Modules of what ranks run, which import torch, megatron-core, DeepSpeed and pretrain; and two that some use later.
IMPORTED = (
    "numba",
    "tests.parallel.rank",
    "tests.parallel.workers.training",
    "tests.parallel.workers.plans",
    "tests.parallel.workers.proof",
    "tests.parallel.workers.sharing",
    "tests.parallel.workers.posttraining",
    "posttrain.grpo",
    "posttrain.rl.rollout_source",
    "posttrain.rl.task_accuracy",
    "posttrain.sft",
    "posttrain.chat.sft_data",
    "pretrain.train",
    "torch.utils.tensorboard",
)


class Forks:
    """Client of the fork server, which starts at the first fork; `close` ends it and every process that it forked."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "fork_server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self, function: str, output: Path, *descriptors: int, **kwargs: Any) -> "Fork":
        """Calls `module:function` in a new process, whose exit status is the function's result, or FAILED if it raises.

        Its stdout and stderr are appended to the file `output`. The process gets the file descriptors `descriptors`,
        and the function their numbers as its first arguments. `kwargs` are JSON.
        """
        request = {"job": "fork", "function": function, "output": str(output), "kwargs": kwargs}
        alive, theirs = os.pipe()
        try:
            return Fork(self, int(self._ask(request, theirs, *descriptors)), alive)
        finally:
            os.close(theirs)

    def status(self, pid: int) -> int | None:
        """Returns the exit status of a forked process, negative after a signal; None while it runs."""
        answer = self._ask({"job": "status", "pid": pid})
        return None if answer is None else int(answer)

    def close(self) -> None:
        """Ends the fork server and every process that it forked."""
        if self._process is not None and self._socket is not None:
            self._process.kill()
            self._process.wait()
            self._socket.close()
        self._process = self._socket = None

    def _ask(self, request: dict[str, Any], *descriptors: int) -> Any:
        if self._socket is None:
            self._start()
        assert self._socket is not None
        line = json.dumps(request, default=str).encode() + b"\n"
        sent = socket.send_fds(self._socket, [line], descriptors) if descriptors else 0
        self._socket.sendall(line[sent:])
        answer = _line(self._socket)
        assert answer, f"the fork server died; the end of its log:\n{self.log.read_text(errors='replace')[-4000:]}"
        return json.loads(answer)

    def _start(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        if sys.platform == "linux":
            env["GLOO_SOCKET_IFNAME"] = "lo"
        self._socket, theirs = socket.socketpair()
        with open(self.log, "wb") as output, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.parallel.forks", str(theirs.fileno())],
                cwd=REPOSITORY,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                preexec_fn=die_with_parent,
            )


class Fork:
    """One forked process, with the methods of subprocess.Popen that tests need."""

    def __init__(self, forks: Forks, pid: int, alive: int) -> None:
        self.pid = pid
        self._forks, self._alive = forks, alive  # `alive`: a pipe that closes when the process ends
        self._status: int | None = None

    def poll(self) -> int | None:
        """Returns the exit status, negative after a signal; None while the process runs."""
        return self.wait(0)

    def wait(self, seconds: float | None = None) -> int | None:
        """Waits until the process has ended, at most `seconds`; returns the exit status, None while it runs."""
        if self._status is None and select.select([self._alive], [], [], seconds)[0]:
            while (status := self._forks.status(self.pid)) is None:  # its pipe is closed, so it ends at once
                time.sleep(0.001)
            self._status = status
            os.close(self._alive)
        return self._status

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process unless it has ended."""
        if self.poll() is None:  # its pid is not reused before the fork server has waited for it
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def main() -> None:
    """Runs the fork server: answers requests until the client closes the socket."""
    import torch  # not at the top: tests without ranks import this module too

    requests = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()  # modules stay, so that looking for garbage among them takes time and finds nothing
    for name in IMPORTED:
        importlib.import_module(name)
    torch.optim.AdamW([torch.zeros(1)])  # the first optimizer imports some 600 modules of torch.compile
    assert threading.active_count() == 1, "a fork would lack the other threads, and hang on locks that they hold"
    gc.collect()
    gc.freeze()  # else a garbage collection in a fork would copy every memory page
    gc.enable()
    while True:
        line, descriptors = _line_with_descriptors(requests)
        if not line:
            return
        request = json.loads(line)
        if request["job"] == "fork":
            answer: int | None = os.fork()
            if not answer:
                requests.close()
                run_and_exit(request, descriptors[1:])
            for descriptor in descriptors:  # else the first, the `alive` pipe, would stay open after the fork has ended
                os.close(descriptor)
        else:
            answer = _status(request["pid"])
        requests.sendall(json.dumps(answer).encode() + b"\n")


def _status(pid: int) -> int | None:
    """Returns the exit status of a process, once: from then on another process may get its pid."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def run_and_exit(request: dict[str, Any], descriptors: Sequence[int] = ()) -> NoReturn:
    """Runs the request's function in this process, which was just forked, and exits."""
    status = FAILED
    try:
        die_with_parent()
        output = os.open(request["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        module, _, name = request["function"].partition(":")
        status = int(getattr(importlib.import_module(module), name)(*descriptors, **request["kwargs"]) or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _line(connection: socket.socket) -> bytes:
    """Reads one line, b"" when the socket is closed; the other side sends no second line before the answer."""
    data = b""
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:
            return b""
        data += more
    return data


def _line_with_descriptors(connection: socket.socket) -> tuple[bytes, list[int]]:
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 8)
    if data and not data.endswith(b"\n"):
        data += _line(connection)
    return data, list(descriptors)


if __name__ == "__main__":
    main()
