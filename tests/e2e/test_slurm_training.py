"""`trivium launch --on slurm` in a real Slurm cluster of two nodes: jobs are warned, save, are requeued and finish."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.loader import toml
from pretrain.checkpoint import storage
from tests.e2e import slurm_cluster
from tests.e2e.slurm_jobs import ENVIRONMENT, Job, launch
from tests.small_training import last_step, write_config

STEPS, ROWS = 120, 100_000  # more rows than any test trains on
SLEEP = "tests.e2e.steps_of_sleep"
SECRET = "planted-7a2c-secret"

pytestmark = pytest.mark.skipif(bool(slurm_cluster.WHY_NOT), reason=slurm_cluster.WHY_NOT)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as conf:
        patch.setenv("SLURM_CONF", str(conf))
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_config(folder, STEPS, folder / "run", rows=ROWS)


@pytest.fixture(scope="module")
def uninterrupted(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The numbers of each step of a run that nothing interrupts."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    (job,) = train(config, run)
    job.wait_for_state("COMPLETED")
    return steps_of(run)


def train(config: Path, run: Path, *overrides: str, options: tuple[str, ...] = ()) -> list[Job]:
    return Job.submitted("train", str(config), f"run.dir={run}", *overrides, options=options)


def steps_of(run: Path) -> list[dict]:
    """Returns the numbers of each step that do not depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: line[key] for key in ("step", "tokens", "loss", "grad_norm", "lr")} for line in lines if "loss" in line
    ]


def sleeping(folder: Path, env: dict[str, str] | None = None, *options: str) -> Job:
    """Submits ranks that sleep in place of training; script, code and output go into a folder of their own."""
    options = ("--job-dir", str(folder / "job"), "--set", "slurm.check_nodes=false", *options)
    (job,) = Job.submitted(SLEEP, str(folder), options=options, env=env)
    return job


def test_a_warned_job_saves_on_every_rank_and_is_requeued(tmp_path: Path) -> None:
    """Checks a job whose paths have a space, a quote, a percent sign and letters beyond ASCII; no secret is written."""
    folder = tmp_path / "l'été 50%j #1"
    folder.mkdir()
    job = sleeping(folder, {"SECRET_TOKEN": SECRET})
    job.wait_for(lambda: (folder / "up_0").exists() and (folder / "up_1").exists())
    job.warn()
    job.wait_for(lambda: job.shows("Restarts") == "1")
    job.cancel()
    assert [(folder / f"saved_{rank}").read_text() for rank in range(2)] == [str(int(signal.SIGUSR1))] * 2
    assert [(folder / f"secret_{rank}").read_text() for rank in range(2)] == ["not there"] * 2
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert job.output in written and folder / "job/1/job.sh" in written
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert "job/code/" in (folder / "code_0").read_text()  # where the rank's own code was


def test_a_job_that_is_warned_as_its_ranks_start_is_requeued(tmp_path: Path) -> None:
    job = sleeping(tmp_path)
    job.wait_for(lambda: f"{job.number}.0" in shown("squeue", "--steps", "--noheader"))
    job.warn()
    job.wait_for(lambda: job.shows("Restarts") == "1")
    # The signal may come before `env` has blocked it, or, as launch.bootstrap sets no handlers for a module of tests,
    # while a rank imports what it needs; in both cases before the rank's first line.
    words = ("User defined signal 1", "was killed by signal 10")
    killed = any(word in job.said() for word in words) and not list(tmp_path.glob("up_*"))
    assert killed or "before the first step" in job.said() or (tmp_path / "saved_0").exists()
    job.cancel()


def test_what_slurm_refuses_is_said_in_one_sentence(tmp_path: Path) -> None:
    done = launch(SLEEP, str(tmp_path), options=("--job-dir", str(tmp_path), "--set", "slurm.partition=gpus"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "invalid partition specified: gpus" in done.stderr and "correct the launch config" in done.stderr


def shown(*command: str) -> str:
    """Returns the output of a Slurm command."""
    return subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.full
@pytest.mark.parametrize("milliseconds", [0, 20, 50, 100, 200, 400, 1000, 3000])
def test_a_job_that_is_warned_at_any_moment_of_its_start_is_requeued(tmp_path: Path, milliseconds: int) -> None:
    """Warns a job while it starts; a signal before the first line of the script kills it, when no rank has started."""
    job = sleeping(tmp_path)
    job.wait_for_state("RUNNING")
    time.sleep(milliseconds / 1000)
    job.warn()
    job.wait_for(lambda: job.shows("Restarts") == "1" or job.shows("JobState") == "FAILED", 60)
    if job.shows("Restarts") == "0":
        assert milliseconds < 1000 and job.shows("ExitCode") == "0:10"
        assert job.said() == "" and not list(tmp_path.glob("up_*"))
    job.cancel()


@pytest.mark.full
@pytest.mark.parametrize("by", ["warning", "scontrol requeue", "both"])
def test_an_interrupted_run_ends_with_the_numbers_of_an_uninterrupted_one(
    config: Path, uninterrupted: list[dict], tmp_path: Path, by: str
) -> None:
    run = tmp_path / "run"
    (job,) = train(config, run)
    (chained,) = Job.submitted(
        SLEEP, str(tmp_path), options=("--job-dir", str(tmp_path / "after"), "--after", job.number)
    )
    ways = {"warning": [job.warn], "scontrol requeue": [lambda: requeue(job)]}
    for number, interrupt in enumerate(ways.get(by) or [*ways["warning"], *ways["scontrol requeue"]], 1):
        job.wait_for(lambda step=20 * number: last_step(run) >= step)
        interrupt()
        job.wait_for(lambda times=str(number): job.shows("Restarts") == times)
        job.wait_for(lambda: bool(storage.steps(run)), seconds=15)  # Slurm counts a requeue before ranks have ended
        assert chained.shows("JobState") == "PENDING"
    saved = storage.steps(run)
    assert saved[0] < STEPS
    job.wait_for_state("COMPLETED")
    assert f"going on from {storage.directory(run, saved[0])}" in job.said()
    assert [line["step"] for line in uninterrupted] == list(range(1, STEPS + 1))
    assert steps_of(run) == uninterrupted
    chained.wait_for_state("RUNNING")
    chained.cancel()


def requeue(job: Job) -> None:
    subprocess.run(["scontrol", "requeue", job.number], check=True)


@pytest.mark.full
def test_a_job_that_is_warned_while_it_starts_is_requeued(config: Path, tmp_path: Path) -> None:
    (job,) = train(config, tmp_path / "run", "train.steps=20")
    job.wait_for(lambda: f"{job.number}.1" in shown("squeue", "--steps", "--noheader"))  # step 0 looks at the nodes
    time.sleep(2)  # ranks are importing
    assert not (tmp_path / "run/metrics.jsonl").exists()
    job.warn()
    job.wait_for(lambda: job.shows("Restarts") == "1")
    job.wait_for_state("COMPLETED")
    assert [line["step"] for line in steps_of(tmp_path / "run")] == list(range(1, 21))


@pytest.mark.full
def test_the_time_limit_is_what_warns_and_requeues_are_counted(config: Path, tmp_path: Path) -> None:
    """Lets Slurm warn before the time limit, so that the run saves; the limit is never reached.

    Slurm counts in minutes and warns up to one minute early: here after half a minute or later, when a save has
    something to save.
    """
    run = tmp_path / "run"
    limits = ('slurm.time="2"', "slurm.warn_seconds=30", "slurm.most_requeues=0")
    (job,) = train(config, run, "train.steps=20000", options=tuple(w for limit in limits for w in ("--set", limit)))
    job.wait_for(lambda: job.shows("JobState") not in ("PENDING", "RUNNING", "COMPLETING"))
    assert storage.steps(run) and "stopped by SIGUSR1" in job.said() and "TIME LIMIT" not in job.said()
    assert job.shows("ExitCode") == "75:0" and "slurm.most_requeues = 0 is reached" in job.said()


@pytest.mark.full
def test_a_cancelled_run_has_saved_and_a_new_job_goes_on(
    config: Path, uninterrupted: list[dict], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (job,) = train(config, run)
    job.wait_for(lambda: last_step(run) >= 3)
    job.cancel()
    job.wait_for_state("CANCELLED")
    job.wait_for(lambda: bool(storage.steps(run)), seconds=15)
    assert job.shows("Restarts") == "0"
    (again,) = train(config, run)
    again.wait_for_state("COMPLETED")
    assert steps_of(run) == uninterrupted and again.output.parent.name == "2"


@pytest.mark.full
def test_a_ranks_death_ends_the_job_and_its_chain_and_a_new_one_goes_on(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (job,) = train(config, run, "checkpoint.every=2")
    (chained,) = train(config, tmp_path / "chained", options=("--after", job.number))
    job.wait_for(lambda: last_step(run) >= 5)
    found = subprocess.run(["pgrep", "-f", f"pretrain.train .*run.dir={run}"], capture_output=True, text=True)
    os.kill(max(int(pid) for pid in found.stdout.split()), signal.SIGKILL)
    job.wait_for_state("FAILED")
    assert job.shows("Restarts") == "0"
    chained.wait_for_state("CANCELLED")
    (again,) = train(config, run, "checkpoint.every=2")
    again.wait_for_state("COMPLETED")
    assert [line["step"] for line in steps_of(run)] == list(range(1, STEPS + 1))


@pytest.mark.full
def test_an_unfit_node_ends_the_job_before_the_command_starts(config: Path, tmp_path: Path) -> None:
    """Runs the doctor on both nodes; on one of them it is a Python that fails, as one without torch does."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[ "$SLURM_NODEID" = 1 ] && exit 1\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (job,) = train(config, tmp_path / "run", options=("--set", f"python={python}"))
    job.wait_for_state("FAILED")
    assert "A node is not fit to start on" in job.said() and "--exclude=NODE" in job.said()
    assert "0: ok       Python" in job.said() and not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.full
def test_a_job_goes_on_without_a_node_that_is_lost(config: Path, uninterrupted: list[dict], tmp_path: Path) -> None:
    """Drains a node before a requeue, which stands for its loss; the job then has one node of one rank."""
    run = tmp_path / "run"
    (job,) = train(config, run, "parallel.tp=2", options=("--min-nodes", "1"))
    job.wait_for(lambda: last_step(run) >= 5)
    set_state("n2", "drain")
    try:
        requeue(job)
        job.wait_for_state("COMPLETED")
    finally:
        set_state("n2", "resume")
    assert job.shows("NumNodes") == "1" and job.shows("Restarts") == "1"
    assert "1 of 2 nodes with 1 ranks: tp2 pp1 dp1 zero1 becomes tp1 pp1 dp1 zero1; with parallel.tp=1" in job.said()
    assert [line["tokens"] for line in steps_of(run)] == [line["tokens"] for line in uninterrupted]


def set_state(node: str, state: str) -> None:
    subprocess.run(["scontrol", "update", f"nodename={node}", f"state={state}", "reason=test"], check=True)


@pytest.mark.full
@pytest.mark.parametrize("bound", [100.0, 0.0])
def test_a_recipe_is_a_chain_of_jobs_that_a_missed_gate_ends(config: Path, tmp_path: Path, bound: float) -> None:
    """Compares the recipe's record and page with those of a recipe that runs in one process."""
    stage = {"command": "train", "config": str(config), "set": ["train.steps=10"]}
    gate = {"metric": "loss", "at_most": bound}
    tree = {"dir": str(tmp_path / "a recipe"), "stages": {"first": {**stage, "gates": [gate]}, "second": stage}}
    (tmp_path / "recipe.toml").write_bytes(toml(tree))
    first, second = Job.submitted("recipe", "run", str(tmp_path / "recipe.toml"))
    done = bound > 0
    first.wait_for_state("COMPLETED" if done else "FAILED")
    second.wait_for_state("COMPLETED" if done else "CANCELLED")
    record = json.loads((tmp_path / "a recipe/recipe.json").read_text())["stages"]
    assert list(record) == ["first", "second"][: 1 + done] and all(one["done"] for one in record.values())
    assert (tmp_path / "a recipe/report.html").exists() == done
    assert len(steps_of(tmp_path / "a recipe/first")) == 10
    assert done or "misses its gates" in first.said()
