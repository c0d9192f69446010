"""Gloo ranks for tests: processes started once, reused by every test, at any world size.

A test asks `ranks(2).run("tests.parallel.workers.harness:total", values=[1, 2])`: the function, named by its import
path, runs in each of 2 ranks with the default process group up, and its JSON results come back in rank order.
An exception in a rank is raised in the test with that rank's traceback; a hang is ended after `timeout` seconds
with the stack of every rank that did not answer; a rank that dies is named with the end of its log. After the
last two the processes are replaced, so that no test is disturbed by the one before it. Tensors are not passed:
functions write safetensors and return the path.

The code inside a rank is in tests/parallel/rank.py.
"""

import itertools
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from launch.ranks import free_port
from tests.parallel.forks import Fork, Forks

AFTER_FIRST_ERROR = 15.0  # seconds that the other ranks get to fail or finish by themselves
LOG_TAIL = 4000  # characters
MEETINGS = 3  # ports that are tried for one call
MOST_THREADS = 40  # of a rank; beyond that all ranks are replaced, since calls leave gloo threads behind that use CPU


class RankError(AssertionError):
    """Error for a rank that raised, died or hung; the message has the rank and its traceback, stack or log."""


class PortTakenError(RankError):
    """Error for a port that another process took before the ranks could meet there."""


@dataclass
class _Process:
    fork: Fork
    connection: Connection
    log: Path


class RankPool:
    """Pool of processes. Rank r of every world is process r; a larger world starts more of them."""

    def __init__(self, directory: Path, forks: Forks) -> None:
        self.directory, self.forks = directory, forks
        self._processes: list[_Process] = []
        self._calls = itertools.count()
        self._started = itertools.count()

    def ranks(self, world_size: int) -> "Ranks":
        """Returns a world of `world_size` ranks."""
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
        """Runs a function in every rank of a world, see `Ranks.run`."""
        if any(_threads(process.fork.pid) > MOST_THREADS for process in self._processes):
            self.close()
        for attempt in range(MEETINGS):
            self._send(world_size, function, kwargs, process_group)
            try:
                return self._collect(world_size, function, timeout)
            except PortTakenError:  # where the harness makes the group, the function has not begun
                if not process_group or attempt == MEETINGS - 1:
                    raise
            except RankError:
                raise
            except BaseException:  # such as Ctrl-C in pytest, while the ranks still run the function
                self.close()
                raise
        raise AssertionError("the last attempt returns or raises")

    def _send(self, world_size: int, function: str, kwargs: dict[str, Any], process_group: bool) -> None:
        """Starts the processes that are missing and calls the function in each of the world."""
        while len(self._processes) < world_size:
            self._processes.append(self._start(len(self._processes)))
        port, number = free_port(), next(self._calls)
        for rank, process in enumerate(self._processes[:world_size]):
            world = {"rank": rank, "world_size": world_size, "port": port, "process_group": process_group}
            message = {"call": number, "function": function, "kwargs": kwargs, **world}
            process.connection.send_bytes(json.dumps(message, default=str).encode())

    def _collect(self, world_size: int, function: str, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        pending = {process.connection: rank for rank, process in enumerate(self._processes[:world_size])}
        results: dict[int, Any] = {}
        errors: list[tuple[int, str]] = []  # exceptions in the order of arrival: the first is the cause
        deaths: list[tuple[int, str]] = []  # the cause of others' exceptions, even if those arrive before
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
                    deaths.append((rank, self._death(rank)))
                    continue
                if "error" in reply:
                    errors.append((rank, reply["error"]))
                else:
                    results[rank] = reply["result"]
            if errors or deaths:
                deadline = min(deadline, time.monotonic() + AFTER_FIRST_ERROR)
        failures = deaths + errors
        if pending and not failures:
            stacks = "\n".join(f"rank {rank}:\n{self._stack(rank)}" for rank in sorted(pending.values()))
            self.close()
            names = ", ".join(map(str, sorted(pending.values())))
            raise RankError(f"{function}: no answer from rank(s) {names} of {world_size} in {timeout:g} s\n{stacks}")
        if failures:
            if pending or deaths:
                self.close()
            rank, text = failures[0]
            others = ", ".join(str(other) for other, _ in failures[1:])
            also = f"\n(then rank(s) {others} failed too)" if others else ""
            error = PortTakenError if any("EADDRINUSE" in text for _, text in failures) else RankError
            raise error(f"{function}: rank {rank} of {world_size} failed first\n{text}{also}")
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
        """Returns the Python stacks of a rank; faulthandler writes them even while it waits in a collective."""
        process = self._processes[rank]
        before = process.log.stat().st_size
        process.fork.send_signal(signal.SIGUSR2)
        time.sleep(0.3)
        return process.log.read_bytes()[before:].decode(errors="replace")[-LOG_TAIL:]


@dataclass(frozen=True)
class Ranks:
    """World of `world_size` ranks on the pool's processes."""

    pool: RankPool
    world_size: int

    def run(self, function: str, timeout: float = 120.0, process_group: bool = True, **kwargs: Any) -> list[Any]:
        """Runs `module:function` in every rank and returns the results by rank.

        `kwargs` and results are JSON; paths become strings. With `process_group` the default gloo group is up
        before the call; without it, the function finds torchrun's variables set and makes the group itself. All
        groups, megatron-core's and DeepSpeed's too, are destroyed after the call. Raises RankError if a rank fails.
        """
        return self.pool.call(self.world_size, function, kwargs, timeout, process_group)


RanksOf = Callable[[int], Ranks]  # type of the fixture `ranks`: number of ranks -> world


def _threads(pid: int) -> int:
    """Returns the number of threads of a process; 0 on systems without /proc."""
    tasks = Path(f"/proc/{pid}/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0
