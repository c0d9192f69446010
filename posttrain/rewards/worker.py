"""Worker processes that call a reward function under limits of time and memory, several at a time.

A function that raises, hangs, ends its process, prints, closes its files or starts other processes cannot stop the
trainer: its attempt is unscorable, with the reason, and a new process takes the place of one that was ended. Unlike
`pretrain.evaluation.sandbox`, a worker forbids nothing: its functions are Trivium's or the user's, not a model's.
"""

import atexit
import importlib.util
import os
import queue
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.files import file_sha256
from configs.loader import ConfigError
from posttrain.piped_process import PipedProcess, ProcessEnded
from posttrain.rewards.attempt import Attempt, TaskScore

CHILD = Path(__file__).with_name("worker_child.py")
START_SECONDS = 120.0  # for the interpreter and the function's module to load on a busy machine
WORKERS = 4  # processes of one reward


@dataclass(frozen=True)
class Call:
    """A function "module:name" with options by name, and the limits of one call."""

    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 5.0
    memory_bytes: int = 2**32


class Worker:
    """One process, started when it is first needed and again after it has ended."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._process: PipedProcess | None = None

    def start(self) -> str:
        """Starts the process, if there is none; returns "", or why the function cannot be called."""
        if self._process is not None and self._process.runs:
            return ""
        self.close()
        self._process = PipedProcess(
            [sys.executable, "-P", "-B", str(CHILD)], environment={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        # A function of the user is found in the working directory too, whichever way the command was started.
        path = [os.getcwd(), *(os.path.abspath(part) for part in sys.path)]
        setup = {
            "path": list(dict.fromkeys(path)),
            "target": self.call.target,
            "options": dict(self.call.options),
            "seconds": self.call.seconds,
            "memory_bytes": self.call.memory_bytes,
        }
        try:
            reply = self._process.exchange(setup, START_SECONDS)
        except ProcessEnded as ended:
            self.close()
            return f"its module, when imported, {ended}"
        if "error" in reply:
            self.close()
        return str(reply.get("error", ""))

    def judge(self, arguments: Mapping[str, Any]) -> TaskScore:
        """Returns the function's value for the four arguments, or why there is none."""
        if fault := self.start():
            return TaskScore.unscorable("cannot be called", fault)
        assert self._process is not None
        try:
            reply = self._process.exchange(arguments, self.call.seconds)
        except ProcessEnded as ended:
            self.close()
            return TaskScore.unscorable(str(ended))
        if "value" in reply:
            return TaskScore.of(reply["value"])
        return TaskScore.unscorable(reply["reason"], reply.get("detail", ""))

    def close(self) -> None:
        """Ends the process and all that it started in its group."""
        if self._process is not None:
            self._process.close()
            self._process = None


class WorkerReward:
    """A reward whose function is called in worker processes."""

    quick, answer_is_text = False, True

    def __init__(self, call: Call, compares: bool, package: str = "", workers: int = WORKERS) -> None:
        """`compares` says whether a problem's solution must get 1; `package` is the one that the function imports."""
        self.call, self.compares, self.package = call, compares, package
        file = None if compares else file_of(call.target)  # only functions of the user may change
        self.made_from: Mapping[str, str] = {"function": call.target, "sha256": file_sha256(file)} if file else {}
        self._count = max(1, min(workers, os.cpu_count() or 1))
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._all = [Worker(call) for _ in range(self._count)]
        for worker in self._all:
            self._idle.put(worker)
        atexit.register(self.close)

    @property
    def seconds(self) -> float:
        """The time for one attempt, in seconds."""
        return self.call.seconds

    def check(self, key: str) -> None:
        """Raises ConfigError if the function cannot be imported or called with four arguments."""
        if self.package and importlib.util.find_spec(self.package.replace("-", "_")) is None:
            raise ConfigError(
                f"{key} needs the package {self.package}, which is not installed; run: pip install 'trivium[rl]' (in "
                "the repository: pip install --constraint constraints.txt '.[rl]')"
            )
        worker = self._idle.get()
        try:
            fault = worker.start()
        finally:
            self._idle.put(worker)
        if fault:
            if self.package:
                raise ConfigError(f"{key} cannot use the package {self.package}: {fault}; raise {key}.memory_mb")
            raise ConfigError(
                f"{key}.function = {self.call.target!r} cannot be called: {fault}; the module is looked for in the "
                "working directory and among installed packages, and the function takes (prompt, completion, answer, "
                f"metadata); if memory is short, raise {key}.memory_mb"
            )

    def __call__(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        with ThreadPoolExecutor(min(self._count, max(1, len(attempts)))) as pool:
            return list(pool.map(self._judge, attempts))

    def _judge(self, attempt: Attempt) -> TaskScore:
        problem, worker = attempt.problem, self._idle.get()
        try:
            return worker.judge(
                {
                    "prompt": problem.prompt,
                    "completion": attempt.completion,
                    "answer": problem.answer,
                    "metadata": dict(problem.metadata),
                }
            )
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._all:
            worker.close()


def file_of(target: str) -> Path | None:
    """Returns the file of a function's module, as a worker finds it; None if there is no such file."""
    name = target.partition(":")[0].replace(".", "/")
    candidates = (
        Path(folder, file) for folder in (os.getcwd(), *sys.path) for file in (f"{name}.py", f"{name}/__init__.py")
    )
    return next((file for file in candidates if file.is_file()), None)
