"""Ranks to be killed: forked by a process that has imported everything, so that a world starts in a second.

It takes jobs as JSON lines and answers with one line each; a rank's own output goes to a file. This process never
computes or opens a socket, so that what it forks starts clean. `Forks` is the test's side of it.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from launch.environment import ClusterEnvironment
from launch.processes import SETTLE_SECONDS, die_with_parent
from tests.parallel.harness import REPOSITORY, free_port

PATIENCE = 60.0  # seconds that ranks have to end when one of them was killed


class Forks:
    """Starts the process; ends it, and with it every rank, on `close`."""

    def __init__(self, log: Path):
        self.log = log
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.forks", str(log)],
            cwd=REPOSITORY, env=env, text=True, preexec_fn=die_with_parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, job: str, **kwargs: Any) -> Any:
        """`run` or `crash` below. Errors: AssertionError with the traceback there."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps({"job": job, **kwargs}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process died"}
        assert "error" not in answer, f"{answer['error']}\n{self.log.read_text(errors='replace')[-4000:]}"
        return answer["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class World:
    """Forked ranks, each of which calls function(**kwargs) and exits with the status that it returns."""

    def __init__(self, size: int, function: Callable[..., int], kwargs: dict[str, Any], log: Path):
        port = free_port()
        self.pids = [self._fork(rank, size, port, function, kwargs, log) for rank in range(size)]
        self.statuses: dict[int, int] = {}

    def _fork(
        self, rank: int, size: int, port: int, function: Callable[..., int], kwargs: dict[str, Any], log: Path
    ) -> int:
        if pid := os.fork():
            return pid
        try:
            die_with_parent()
            output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(
                ClusterEnvironment("torchrun", rank, size, rank, size, 0, "127.0.0.1", port).as_variables()
            )
            status = function(**kwargs)
        except BaseException:
            traceback.print_exc()
            status = 70
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def send(self, ranks: Sequence[int], number: int = signal.SIGKILL) -> None:
        for rank in ranks:
            if rank not in self.statuses:
                os.kill(self.pids[rank], number)

    def running(self) -> bool:
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) < len(self.pids)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits for the ranks' end, for `until`, or for `seconds`. True if ranks are still running."""
        deadline = time.monotonic() + seconds
        while (running := self.running()) and not until() and time.monotonic() < deadline:
            time.sleep(0.0005)
        return running


def run(size: int, kwargs: dict[str, Any], log: Path) -> list[int]:
    """Trains in a world of `size`; returns the ranks' exit statuses: a training status, or 1 for an error of it."""
    world = World(size, _train, kwargs, log)
    hung = world.wait(10 * PATIENCE)
    world.send(range(size))
    world.wait(PATIENCE)
    assert not hung, f"ranks did not end by themselves: {world.statuses}"
    return [world.statuses[rank] for rank in range(size)]


def crash(size: int, kwargs: dict[str, Any], seed: int, kills: int, torn: int, log: Path) -> dict[str, Any]:
    """Trains, killed at least `kills` times and in at least `torn` saves, until it is finished.

    Every other kill is at any moment from the start on, the others are aimed into a save. Either one rank or all are
    killed; the rank that is left must end, by itself or when it is told. Returns a line for each kill.
    """
    rng, checkpoints = random.Random(seed), Path(kwargs["run_dir"]) / "checkpoints"
    done: list[dict[str, Any]] = []
    aimed = True
    while len(done) < kills or sum(kill["torn"] for kill in done) < torn:
        assert len(done) < 3 * kills, f"too few of the kills hit a save: {done}"
        world = World(size, _train, kwargs, log)
        if aimed:
            began = time.monotonic()
            before = {path.name for path in checkpoints.glob("step_*")}
            saves = rng.randint(0, 2)  # which of the first three

            def in_a_save(before: set[str] = before, saves: int = saves) -> bool:
                new = {path.name for path in checkpoints.glob("step_*")} - before
                return len(new) >= saves and any(checkpoints.glob(".step_*/rank_*"))

            running = world.wait(PATIENCE, until=in_a_save) and world.wait(rng.uniform(0, 0.004))
            seconds = time.monotonic() - began
        else:
            running = world.wait(rng.uniform(0, 1.5 * seconds))
        if not running:
            assert set(world.statuses.values()) == {0}, f"ended before it was killed: {world.statuses}"
            raise AssertionError(f"the run was over after {len(done)} kills; give it more steps")
        victims = rng.choice([[0], [size - 1], list(range(size))])
        world.send(victims)
        left = any(checkpoints.glob(".step_*"))
        if world.wait(SETTLE_SECONDS):  # as the launcher does; a rank that is still starting waits for its dead peer
            world.send(range(size), signal.SIGTERM)
        hung = world.wait(PATIENCE)
        world.send(range(size))
        world.wait(PATIENCE)
        assert not hung, f"after the kill of {victims} the others did not end: {world.statuses}"
        done.append({"aimed": aimed, "victims": victims, "torn": left, "newest": _newest(checkpoints)})
        aimed = not aimed
    assert run(size, kwargs, log) == [0] * size
    return {"kills": done}


def _newest(checkpoints: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints.glob("step_*")), default=0)


def _train(**kwargs: Any) -> int:
    from tests.parallel.workers import training

    torch.set_num_threads(1)
    answer = getattr(training, kwargs.pop("function", "train"))(**kwargs)
    print(answer, flush=True)
    return int(answer.get("status", 1))


def main() -> None:
    import tests.parallel.workers.training  # noqa: F401  everything, megatron-core and DeepSpeed too, before the first fork

    log = Path(sys.argv[1])
    for line in sys.stdin:
        job = json.loads(line)
        try:
            result = {"run": run, "crash": crash}[job.pop("job")](**job, log=log)
            answer = {"result": result}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
