"""Gloo ranks for tests: processes started once, reused by every test, at any world size.

A test asks `ranks(2).run("tests.parallel.workers.harness:total", values=[1, 2])`: the function, named by its import
path, runs in each of 2 ranks with the default process group up, and its JSON results come back in rank order.
An exception in a rank is raised in the test with that rank's traceback; a hang is ended after `timeout` seconds
with the stack of every rank that did not answer; a rank that dies is named with the end of its log. After the
last two the processes are replaced, so one bad test does not spoil the next. Leaves out tensors: functions write
safetensors and return the path.

What runs inside a rank is in tests/parallel/rank.py.
"""

import itertools
import json
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from tests.parallel.forks import Fork, Forks

AFTER_FIRST_ERROR = 15.0  # seconds the other ranks have to fail or finish by themselves
LOG_TAIL = 4000  # characters
MOST_THREADS = 40  # of a rank, before all start anew: a few of gloo's stay with it after some calls, and never rest


class RankError(AssertionError):
    """A rank raised, died or hung. The message holds the rank and its traceback, stack or log."""


@dataclass
class _Process:
    fork: Fork
    connection: Connection
    log: Path


class RankPool:
    """The processes. Rank r of any world is process r; more are started when a larger world is asked for."""

    def __init__(self, directory: Path, forks: Forks) -> None:
        self.directory, self.forks = directory, forks
        self._processes: list[_Process] = []
        self._calls = itertools.count()
        self._started = itertools.count()

    def ranks(self, world_size: int) -> "Ranks":
        """A world of `world_size` ranks."""
        return Ranks(self, world_size)

    def close(self) -> None:
        """Ends all processes."""
        for process in self._processes:
            process.fork.kill()
            process.fork.wait()
            process.connection.close()
        self._processes.clear()

    def call(
        self, world_size: int, function: str, kwargs: dict[str, Any], timeout: float, process_group: bool
    ) -> list[Any]:
        """See Ranks.run."""
        if any(_threads(process.fork.pid) > MOST_THREADS for process in self._processes):
            self.close()
        while len(self._processes) < world_size:
            self._processes.append(self._start(len(self._processes)))
        port, number = free_port(), next(self._calls)
        for rank, process in enumerate(self._processes[:world_size]):
            world = {"rank": rank, "world_size": world_size, "port": port, "process_group": process_group}
            message = {"call": number, "function": function, "kwargs": kwargs, **world}
            process.connection.send_bytes(json.dumps(message, default=str).encode())
        try:
            return self._collect(world_size, function, timeout)
        except RankError:
            raise
        except BaseException:  # Ctrl-C in pytest: the ranks are in the middle of something
            self.close()
            raise

    def _collect(self, world_size: int, function: str, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        pending = {process.connection: rank for rank, process in enumerate(self._processes[:world_size])}
        results: dict[int, Any] = {}
        errors: list[tuple[int, str]] = []  # in the order of arrival: the first is the cause
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending.pop(connection)
                try:
                    reply = json.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    errors.append((rank, self._death(rank)))
                    continue
                if "error" in reply:
                    errors.append((rank, reply["error"]))
                else:
                    results[rank] = reply["result"]
            if errors:
                deadline = min(deadline, time.monotonic() + AFTER_FIRST_ERROR)
        if pending and not errors:
            stacks = "\n".join(f"rank {rank}:\n{self._stack(rank)}" for rank in sorted(pending.values()))
            self.close()
            names = ", ".join(map(str, sorted(pending.values())))
            raise RankError(f"{function}: no answer from rank(s) {names} of {world_size} in {timeout:g} s\n{stacks}")
        if errors:
            if pending or any(self._processes[rank].fork.poll() is not None for rank, _ in errors):
                self.close()
            rank, text = errors[0]
            others = ", ".join(str(other) for other, _ in errors[1:])
            also = f"\n(then rank(s) {others} failed too)" if others else ""
            raise RankError(f"{function}: rank {rank} of {world_size} failed first\n{text}{also}")
        return [results[rank] for rank in range(world_size)]

    def _start(self, rank: int) -> _Process:
        ours, theirs = Pipe()
        log = self.directory / f"process{next(self._started)}.log"
        with theirs:
            fork = self.forks.start("tests.parallel.rank:serve", log, theirs.fileno())
        return _Process(fork, ours, log)

    def _death(self, rank: int) -> str:
        process = self._processes[rank]
        status = process.fork.wait()
        tail = process.log.read_text(errors="replace")[-LOG_TAIL:]
        return f"the process ended with status {status}; the end of its log:\n{tail}"

    def _stack(self, rank: int) -> str:
        """Asks the rank for its Python stacks; faulthandler answers even when a collective holds it."""
        process = self._processes[rank]
        before = process.log.stat().st_size
        process.fork.send_signal(signal.SIGUSR2)
        time.sleep(0.3)
        return process.log.read_bytes()[before:].decode(errors="replace")[-LOG_TAIL:]


@dataclass(frozen=True)
class Ranks:
    """A world of some size on the pool's processes."""

    pool: RankPool
    world_size: int

    def run(self, function: str, timeout: float = 120.0, process_group: bool = True, **kwargs: Any) -> list[Any]:
        """Runs `module:function` in every rank. Returns what each returned, by rank. Errors: RankError.

        `kwargs` and results are JSON; paths become strings. With `process_group` the default gloo group is up
        before the call; without, the function finds torchrun's variables set and brings it up itself. All
        groups, megatron-core's and deepspeed's too, are gone after the call.
        """
        return self.pool.call(self.world_size, function, kwargs, timeout, process_group)


RanksOf = Callable[[int], Ranks]  # the fixture `ranks`: a world of that many


def _threads(pid: int) -> int:
    """Of a process; 0 where the system does not say."""
    tasks = Path(f"/proc/{pid}/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
