"""Scripts of launch/slurm in a real Slurm cluster of two nodes: jobs are warned, save, are requeued and finish."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.checkpoint import storage
from tests.e2e import slurm_cluster
from tests.small_training import last_step, write_config

ROOT = Path(__file__).resolve().parents[2]
STEPS, ROWS = 120, 100_000  # more rows than any test trains on
# On one core each: two launchers share this machine, while on two machines each would have all cores.
LAUNCHER = ["taskset", "-c", "0", "python", "-m", "cli", "launch", "--nproc-per-node", "1", "train"]
SCRIPTS = {
    "ranks by srun": ("srun.sh", ["python", "-m", "cli", "train"]),
    "launchers by srun": ("srun.sh", LAUNCHER),
    "mpirun": ("mpirun.sh", ["python", "-m", "cli", "train"]),
    "torchrun": ("torchrun.sh", ["--nproc-per-node", "1", "-m", "pretrain.train"]),
}

pytestmark = pytest.mark.skipif(bool(slurm_cluster.WHY_NOT), reason=slurm_cluster.WHY_NOT)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as conf:
        patch.setenv("SLURM_CONF", str(conf))
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("MASTER_ADDR", "127.0.0.1")  # the nodes' names cannot be resolved
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_config(folder, STEPS, folder / "run", rows=ROWS)


class Job:
    """Batch job with one task per node, and its output."""

    def __init__(self, folder: Path, script: str, *command: str, options: tuple[str, ...] = ()):
        self.output = folder / "output"
        form = ("--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={self.output}", f"--chdir={ROOT}")
        command = ("sbatch", *form, *options, str(ROOT / "launch/slurm" / script), *command)
        self.number = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        self.in_script = "--signal=B:" in (ROOT / "launch/slurm" / script).read_text()

    def cancel(self, *options: str) -> None:
        subprocess.run(["scancel", *options, self.number], check=True)

    def warn(self) -> None:
        """Sends the signal that the script's `--signal` option sends before the time limit."""
        self.cancel("--signal=USR1", *(["--batch"] if self.in_script else []))

    def shows(self, key: str) -> str:
        done = subprocess.run(["scontrol", "show", "job", self.number], capture_output=True, text=True, check=True)
        found = re.search(rf"\b{key}=(\S+)", done.stdout)
        assert found is not None, done.stdout
        return found[1]

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_for(self, what: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, f"{self.shows('JobState')}\n{self.said()[-5000:]}"
            time.sleep(0.1)

    def wait_for_state(self, state: str) -> None:
        self.wait_for(lambda: self.shows("JobState") == state)


def shown(*command: str) -> str:
    """Returns the output of a Slurm command."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def steps_of(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def test_a_warned_job_saves_on_every_rank_and_is_requeued(tmp_path: Path) -> None:
    job = Job(tmp_path, "srun.sh", "python", "-m", "tests.e2e.steps_of_sleep", str(tmp_path))
    job.wait_for(lambda: (tmp_path / "up_0").exists() and (tmp_path / "up_1").exists())
    job.warn()
    job.wait_for(lambda: job.shows("Restarts") == "1")
    job.cancel()
    assert [(tmp_path / f"saved_{rank}").read_text() for rank in range(2)] == [str(int(signal.SIGUSR1))] * 2


SLEEP = {
    "ranks by srun": ("srun.sh", ["python", "-m", "tests.e2e.steps_of_sleep"]),
    "mpirun": ("mpirun.sh", ["python", "-m", "tests.e2e.steps_of_sleep"]),
    "torchrun": ("torchrun.sh", ["--nproc-per-node", "1", "-m", "tests.e2e.steps_of_sleep"]),
}


def test_a_job_that_is_warned_as_its_ranks_start_is_requeued(tmp_path: Path) -> None:
    script, command = SLEEP["ranks by srun"]
    job = Job(tmp_path, script, *command, str(tmp_path))
    job.wait_for(lambda: f"{job.number}.0" in shown("squeue", "--steps", "--noheader"))
    job.warn()
    job.wait_for(lambda: job.shows("Restarts") == "1", 60)
    # Slurm may kill a task before `env` has blocked the signal, and so before the rank's first line.
    killed = "User defined signal 1" in job.said() and not list(tmp_path.glob("up_*"))
    assert killed or "before the first step" in job.said() or (tmp_path / "saved_0").exists()
    job.cancel()


@pytest.mark.full
@pytest.mark.parametrize("way", SLEEP)
@pytest.mark.parametrize("milliseconds", [0, 20, 50, 100, 200, 400, 1000, 3000])
def test_a_job_that_is_warned_at_any_moment_of_its_start_is_requeued(
    tmp_path: Path, way: str, milliseconds: int
) -> None:
    """A signal before the first line of the script kills the job, which has not started any rank yet."""
    script, command = SLEEP[way]
    job = Job(tmp_path, script, *command, str(tmp_path))
    job.wait_for_state("RUNNING")
    time.sleep(milliseconds / 1000)
    job.warn()
    job.wait_for(lambda: job.shows("Restarts") == "1" or job.shows("JobState") == "FAILED", 60)
    if job.shows("Restarts") == "0":
        assert milliseconds < 1000 and job.shows("ExitCode") == "0:10"
        assert job.said() == "" and not list(tmp_path.glob("up_*"))
    job.cancel()


@pytest.mark.full
@pytest.mark.parametrize("way", SCRIPTS)
def test_a_warned_run_goes_on_where_it_was(config: Path, tmp_path: Path, way: str) -> None:
    script, command = SCRIPTS[way]
    run = tmp_path / "run"
    job = Job(tmp_path, script, *command, str(config), f"run.dir={run}")
    job.wait_for(lambda: last_step(run) >= 3)
    job.warn()
    job.wait_for(lambda: job.shows("Restarts") == "1")
    (saved,) = storage.steps(run)
    assert 3 <= saved < STEPS
    job.wait_for_state("COMPLETED")
    assert f"going on from {storage.directory(run, saved)}" in job.said()
    assert steps_of(run) == list(range(1, STEPS + 1)) and storage.steps(run)[-1] == STEPS


@pytest.mark.full
@pytest.mark.parametrize("way", SCRIPTS)
def test_a_job_that_is_warned_while_it_starts_is_requeued(config: Path, tmp_path: Path, way: str) -> None:
    script, command = SCRIPTS[way]
    job = Job(tmp_path, script, *command, str(config), f"run.dir={tmp_path / 'run'}", "train.steps=20")
    job.wait_for_state("RUNNING")
    time.sleep(4)  # ranks are importing
    assert not (tmp_path / "run/metrics.jsonl").exists()
    job.warn()
    job.wait_for(lambda: job.shows("Restarts") == "1")
    job.wait_for_state("COMPLETED")
    assert steps_of(tmp_path / "run") == list(range(1, 21))


@pytest.mark.full
def test_the_time_limit_is_what_warns(config: Path, tmp_path: Path) -> None:
    """Slurm's own warning before the time limit makes the run save; the limit is never reached.

    Slurm counts in minutes and warns up to one minute early, so here after half a minute or later, when there is
    something to save.
    """
    run = tmp_path / "run"
    command = ("python", "-m", "cli", "train", str(config), f"run.dir={run}", "train.steps=20000")
    job = Job(tmp_path, "srun.sh", *command, options=("--time=2", "--signal=USR1@30"))
    job.wait_for(lambda: job.shows("Restarts") == "1")
    assert storage.steps(run) and "stopped by SIGUSR1" in job.said() and "TIME LIMIT" not in job.said()
    job.cancel()


@pytest.mark.full
@pytest.mark.parametrize("way", SCRIPTS)
def test_a_cancelled_run_has_saved_and_a_new_job_goes_on(config: Path, tmp_path: Path, way: str) -> None:
    run = tmp_path / "run"
    script, command = SCRIPTS[way]
    job = Job(tmp_path, script, *command, str(config), f"run.dir={run}")
    job.wait_for(lambda: last_step(run) >= 3)
    job.cancel()
    job.wait_for_state("CANCELLED")
    job.wait_for(lambda: bool(storage.steps(run)), seconds=15)
    assert job.shows("Restarts") == "0"
    again = Job(tmp_path, script, *command, str(config), f"run.dir={run}")
    again.wait_for_state("COMPLETED")
    assert steps_of(run) == list(range(1, STEPS + 1))


@pytest.mark.full
@pytest.mark.parametrize("way", [way for way in SCRIPTS if SCRIPTS[way][0] == "srun.sh"])
def test_a_ranks_death_ends_the_job_and_a_new_one_goes_on(config: Path, tmp_path: Path, way: str) -> None:
    script, command = SCRIPTS[way]
    run = tmp_path / "run"
    arguments = (*command, str(config), f"run.dir={run}", "checkpoint.every=2")
    job = Job(tmp_path, script, *arguments)
    job.wait_for(lambda: last_step(run) >= 5)
    found = subprocess.run(
        ["pgrep", "-f", f"(cli train|pretrain.train).*run.dir={run}"], capture_output=True, text=True
    )
    os.kill(max(int(pid) for pid in found.stdout.split()), signal.SIGKILL)
    job.wait_for_state("FAILED")
    assert job.shows("Restarts") == "0"
    again = Job(tmp_path, script, *arguments)
    again.wait_for_state("COMPLETED")
    assert steps_of(run) == list(range(1, STEPS + 1))
