"""Starts the ranks of a proof once, and gives them layout after layout: starting a rank takes many seconds."""

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

SECONDS = 1800.0  # that one job may take
SETTLE_SECONDS = 5.0  # that the other ranks have after one failed
TAIL = 3000  # characters of a rank's output in an error
MOST_THREADS = 150  # of a rank, before all start anew: a few of gloo's threads stay after each job


class ProofRanks:
    """Context manager that keeps rank processes running between jobs; more are started when a job needs them.

    A rank ends when its standard input closes, so also when this process is killed. With `device` cpu ranks see no GPU.
    """

    def __init__(self, device: str = "auto") -> None:
        self._hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        self._ranks: list[tuple[subprocess.Popen[str], IO[str]]] = []

    def __enter__(self) -> "ProofRanks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all ranks."""
        for process, log in self._ranks:
            process.kill()
            process.wait()
            log.close()
        self._ranks.clear()

    def run(
        self,
        world_size: int,
        config: dict[str, Any],
        precision: str,
        inject: str | None,
        reference: Path | None,
        start: Path | None = None,
    ) -> None:
        """Takes the recorded steps of `config` on `world_size` ranks, which write into its run.dir.

        With `start`, one rank begins from the weights and rows in that file, which is made if there is none.
        Raises RuntimeError with the output of the rank that failed first, or if a rank takes too long.
        """
        if any(_threads(process.pid) > MOST_THREADS for process, _ in self._ranks):
            self.close()
        while len(self._ranks) < world_size:
            self._ranks.append(self._start(len(self._ranks)))
        job = {"world_size": world_size, "port": _free_port(), "config": config, "precision": precision}
        job |= {"inject": inject, "reference": None if reference is None else str(reference)}
        job["start"] = None if start is None else str(start)
        for process, _ in self._ranks[:world_size]:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        try:
            self._wait(world_size)
        except BaseException:  # the others are in the middle of something
            self.close()
            raise

    def _wait(self, world_size: int) -> None:
        deadline, error = time.monotonic() + SECONDS, ""
        streams = [process.stdout for process, _ in self._ranks[:world_size]]
        pending = {stream: rank for rank, stream in enumerate(streams) if stream is not None}
        while pending:
            ready = select.select(list(pending), [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                break
            for stream in ready:
                rank = pending.pop(stream)
                line = stream.readline()
                said = json.loads(line).get("error", "") if line else f"the process ended\n{self._tail(rank)}"
                if said and not error:
                    error, deadline = f"rank {rank} of {world_size} failed\n{said}", time.monotonic() + SETTLE_SECONDS
        if error or pending:
            raise RuntimeError(error or f"ranks {sorted(pending.values())} of {world_size} took over {SECONDS:.0f} s")

    def _start(self, rank: int) -> tuple[subprocess.Popen[str], IO[str]]:
        log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by `close`
        process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.proof.pool_rank", str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={
                **os.environ,
                **self._hidden,
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 4))),
            },
        )
        return process, log

    def _tail(self, rank: int) -> str:
        log = self._ranks[rank][1]
        log.seek(0)
        return log.read()[-TAIL:]


def _threads(pid: int) -> int:
    """Returns the number of threads of a process; 0 where the system does not say."""
    tasks = Path(f"/proc/{pid}/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


def _free_port() -> int:
    """Returns a TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
