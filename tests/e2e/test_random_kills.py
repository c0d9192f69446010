"""Runs started in turn by `trivium launch`, torchrun and mpirun, and killed 20 times in all, end as if nothing was."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pretrain.checkpoint import storage
from tests.e2e.started_commands import ROOT, TORCHRUN, TRAINING, Command
from tests.parallel.runs import assert_same_state, metrics
from tests.small_training import last_step, write_config

pytestmark = pytest.mark.full
RUNS, KILLS, STEPS, EVERY = 5, 4, 400, 40
WAYS = {"launch": TRAINING["launch"], "torchrun": TORCHRUN, "mpirun": TRAINING["mpirun"]}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    config = write_config(folder, STEPS, folder / "run", rows=4 * STEPS, every=EVERY)
    done = subprocess.run([*WAYS["launch"], str(config)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("number", range(RUNS))
def test_random_kills_across_launchers_change_no_bit(tmp_path: Path, straight: Path, number: int) -> None:
    """Kills ranks while they start, train and save: one, all, or their launcher, after which they end."""
    run = tmp_path / "killed"
    config = write_config(tmp_path, STEPS, run, rows=4 * STEPS, every=EVERY)
    rng, ways = random.Random(number), list(WAYS)
    for done in range(1, KILLS + 1):
        way = ways[(number + done) % len(ways)]
        command = Command(tmp_path, [*WAYS[way], str(config)])
        wait_for_moment(rng, command, run)
        assert command.process.poll() is None, f"{way} ended before kill {done}: {command.said()}"
        kill(rng, command)
        assert command.survivors(90) == [], f"processes are left after kill {done} of {way}: {command.said()}"
        assert command.process.wait(60) != 0
    assert storage.steps(run)[-1:] < [STEPS], "the run was over before the last kill; give it more steps"
    way = ways[number % len(ways)]
    end = subprocess.run([*WAYS[way], str(config)], cwd=ROOT, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    assert metrics(run) == metrics(straight)
    assert_same_state(storage.directory(run, STEPS), storage.directory(straight, STEPS))


def wait_for_moment(rng: random.Random, command: Command, run: Path) -> None:
    """Waits until two ranks are there, and then for a random time, or a random number of steps after the first."""
    deadline = time.monotonic() + 120
    while len(command.ranks()) < 2 and command.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    if rng.random() < 0.4:
        time.sleep(rng.uniform(0, 8))
        return
    before, log = last_step(run), inode(run)
    while inode(run) == log and command.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # until the run goes on, with a new log
    wanted = min(before, last_step(run)) + rng.randint(1, 2 * EVERY)
    while last_step(run) < wanted and command.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def inode(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.stat().st_ino if log.exists() else 0


def kill(rng: random.Random, command: Command) -> None:
    """Kills one of the ranks, all of them, or the launcher alone."""
    ranks = command.ranks()
    victims = rng.choice([ranks[:1], ranks[-1:], ranks, [command.process.pid]])
    for process in victims:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
