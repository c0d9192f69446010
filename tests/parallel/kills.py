"""Training runs whose ranks are killed at random moments until the run is finished, or have a disk of their own."""

import ctypes
import importlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.environment import ClusterEnvironment
from launch.processes import SETTLE_SECONDS
from launch.ranks import free_port
from tests.parallel.forks import Forks, run_and_exit

PATIENCE = 60.0  # seconds that ranks get to end after one of them was killed
LOG_TAIL = 4000  # characters


class World:
    """Ranks of one training run, each a process whose exit status is that of the training; `kwargs` are its options."""

    def __init__(self, forks: Forks, size: int, kwargs: dict[str, Any], log: Path):
        port = free_port()
        self.ranks = [
            forks.start("tests.parallel.kills:train", log, rank=rank, size=size, port=port, options=kwargs)
            for rank in range(size)
        ]
        self.log = log

    @property
    def statuses(self) -> list[int | None]:
        return [rank.poll() for rank in self.ranks]

    def send(self, ranks: Sequence[int], number: int = signal.SIGKILL) -> None:
        for rank in ranks:
            self.ranks[rank].send_signal(number)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits until all ranks have ended, `until` is true or `seconds` are over; returns whether ranks still run."""
        deadline = time.monotonic() + seconds
        while (running := None in self.statuses) and not until() and time.monotonic() < deadline:
            time.sleep(0.0005)
        return running

    def end(self, why: str) -> None:
        """Kills the ranks that still run, and fails if there were any."""
        hung = None in self.statuses
        said = f"{why} ranks did not end by themselves: {self.statuses}" if hung else ""
        self.send(range(len(self.ranks)))
        self.wait(PATIENCE)
        assert not hung, f"{said}\n{self.log.read_text(errors='replace')[-LOG_TAIL:]}"


def run(forks: Forks, size: int, kwargs: dict[str, Any], log: Path) -> list[int | None]:
    """Trains on `size` ranks and returns their exit statuses: that of the training, or 1 for an exception."""
    world = World(forks, size, kwargs, log)
    world.wait(10 * PATIENCE)
    world.end("untouched")
    return world.statuses


def crash(
    forks: Forks, size: int, kwargs: dict[str, Any], seed: int, kills: int, torn: int, log: Path
) -> list[dict[str, Any]]:
    """Kills and restarts a training run at least `kills` times, at least `torn` of them during a save; finishes it.

    Every second kill comes at a random moment, the others during a save. One rank or all are killed; a rank that is
    left must end by itself or on SIGTERM. Returns a record of each kill: whether it was aimed at a save, its victims,
    whether a save was cut short, and the newest whole checkpoint after it.
    """
    rng, checkpoints = random.Random(seed), Path(kwargs["run_dir"]) / "checkpoints"
    done: list[dict[str, Any]] = []
    aimed, seconds = True, 0.0
    while len(done) < kills or sum(kill["torn"] for kill in done) < torn:
        assert len(done) < 3 * kills, f"too few of the kills hit a save: {done}"
        world = World(forks, size, kwargs, log)
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
            assert set(world.statuses) == {0}, f"ended before it was killed: {world.statuses}"
            raise AssertionError(f"the run was over after {len(done)} kills; give it more steps")
        victims = rng.choice([[0], [size - 1], list(range(size))])
        world.send(victims)
        left = any(checkpoints.glob(".step_*"))
        if world.wait(SETTLE_SECONDS):  # as a launcher would: a rank that is still starting waits for its dead peer
            world.send(range(size), signal.SIGTERM)
        world.wait(PATIENCE)
        world.end(f"after the kill of {victims}")
        done.append({"aimed": aimed, "victims": victims, "torn": left, "newest": _newest(checkpoints)})
        aimed = not aimed
    assert run(forks, size, kwargs, log) == [0] * size
    return done


def _newest(checkpoints: Path) -> int:
    return max((int(path.name[5:]) for path in checkpoints.glob("step_*")), default=0)


def train(rank: int, size: int, port: int, options: dict[str, Any]) -> int:
    """Runs in a forked rank: calls `train` of tests/parallel/workers/training.py, or the function that options name.

    `function` is one of that module, or of another in its folder, as in "hanging:hang".
    """
    import torch

    torch.set_num_threads(1)
    os.environ.update(ClusterEnvironment("torchrun", rank, size, rank, size, 0, "127.0.0.1", port).as_variables())
    module, _, name = options.pop("function", "train").rpartition(":")
    worker = importlib.import_module(f"tests.parallel.workers.{module or 'training'}")
    answer = getattr(worker, name)(**options)
    print(answer, flush=True)
    return int(answer.get("status", 1))


def train_on_own_disk(disk: str, mebibytes: int, size: int, runs: list[dict[str, Any]], log: str) -> int:
    """Runs in a forked process: trains on `size` ranks, for which a new file system is mounted at `disk`.

    `runs` are the options of the trainings, one after another. Returns 0 if all ranks of the last end with status 0,
    else the status of the first that did not.
    """
    mount(disk, f"size={mebibytes}m")
    for options in runs:
        Path(options["run_dir"]).mkdir(exist_ok=True)
        port, ranks = free_port(), []
        for rank in range(size):
            kwargs = {"rank": rank, "size": size, "port": port, "options": options}
            ranks.append(os.fork())
            if not ranks[-1]:
                run_and_exit({"function": "tests.parallel.kills:train", "kwargs": kwargs, "output": log})
        statuses = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    return next(filter(None, statuses), 0)


def mount(directory: str, options: str = "", folder: str = "") -> None:
    """Mounts `folder`, or an empty file system in memory, at `directory`, as the command unshare.

    This process, which must have one thread, and its children alone see it. `options` are those of the file system.
    """
    new_user, new_mounts, private, recursive = 0x10000000, 0x20000, 1 << 18, 1 << 14  # from sched.h and sys/mount.h
    bind = 1 << 12 if folder else 0
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(new_user | new_mounts))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(private | recursive), None))
    source = folder.encode() or b"none"
    check(libc.mount(source, directory.encode(), b"tmpfs", ctypes.c_ulong(bind), options.encode()))
