"""Data runs that are killed with SIGKILL at random moments and continued with other executors or numbers of workers.

They publish the same bytes as an undisturbed run. Runs on Slurm are killed in test_executors.py.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from data_pipeline.command import main
from tests.data_runs import command, environment, published, write_inputs

LIMIT_SECONDS = 120
RANKS = 2
# (arguments of a run, its number of ranks under mpirun or 0); runs use them in turn.
WAYS = ((["run.workers=2"], 0), ([], RANKS), (["run.workers=1"], 0), (["run.workers=3"], 0))


def start(config: Path, way: tuple[list[str], int]) -> subprocess.Popen[str]:
    arguments, ranks = way
    return subprocess.Popen(
        command(config, *arguments, ranks=ranks),
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str], all_at_once: bool) -> None:
    """Kills all processes of a run, or only its main process, after which the others must end by themselves."""
    (os.killpg if all_at_once else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(process.pid, 0)
            assert time.monotonic() < deadline, "a killed run left processes that write to its folder"
            time.sleep(0.02)


def unpublished(run_dir: Path) -> set[str]:
    """Returns the names of unfinished stages' temporary folders."""
    return {path.name for path in run_dir.glob(".*.tmp")}


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.full)])
def test_killed_runs_publish_what_an_undisturbed_one_does(tmp_path: Path, kills: int) -> None:
    config, draw = write_inputs(tmp_path), random.Random(kills)
    for name in ("compiled", "calm"):  # only the first run compiles, so the second is timed
        began = time.monotonic()
        assert main([str(config), f"run.dir={tmp_path}/{name}", "run.workers=1"]) == 0
        seconds = time.monotonic() - began
    calm, run_dir = published(tmp_path / "calm"), tmp_path / "run"
    killed, in_a_stage = 0, 0
    ways = itertools.cycle(WAYS)
    while killed < kills:
        old = unpublished(run_dir)
        process = start(config, next(ways))
        # The time is drawn from the start of its first stage, since starting takes as long and writes nothing.
        deadline = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None and not unpublished(run_dir) - old:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, 0.7 * seconds))
        if process.poll() is None:
            kill(process, all_at_once=killed % 2 == 1)
            killed += 1
            in_a_stage += bool(unpublished(run_dir) - old)
        else:
            assert process.returncode == 0, process.stderr and process.stderr.read()
            assert published(run_dir) == calm
            shutil.rmtree(run_dir)
    process = start(config, next(ways))
    _, said = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 0, said
    assert published(run_dir) == calm
    assert not unpublished(run_dir)
    assert in_a_stage >= kills / 2, "most of the work is in stages, so most kills must have met one"
