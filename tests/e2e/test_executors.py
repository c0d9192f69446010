"""Every executor gives the same data run the same bytes, whatever the number of tasks and workers.

Slurm is a real cluster on this machine (slurm_cluster.py); Ray is started for the run. Both take minutes.
"""

import importlib.util
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.command import main
from data_pipeline.core.shards import shard_path, shards_under
from data_pipeline.executors import slurm_executor as slurm
from tests import data_runs
from tests.data_runs import command, environment, published, took_part
from tests.e2e import slurm_cluster

LIMIT_SECONDS = 600


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_runs.write_inputs(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(config: Path) -> Path:
    """Run directory of a run in one process, which does one task after another."""
    run_dir = config.parent / "alone"
    assert main([str(config), f"run.dir={run_dir}", "run.workers=1"]) == 0
    return run_dir


def start(arguments: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        env=environment(**more),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=LIMIT_SECONDS,
    )


def test_local_workers(config: Path, alone: Path, tmp_path: Path) -> None:
    assert main([str(config), f"run.dir={tmp_path}", "run.workers=3"]) == 0
    assert len(took_part(tmp_path)) == 3
    assert published(tmp_path) == published(alone)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.full)])
def test_mpi_ranks(config: Path, alone: Path, tmp_path: Path, ranks: int) -> None:
    done = start(command(config, f"run.dir={tmp_path}", ranks=ranks))
    assert (done.returncode, done.stderr) == (0, "")
    assert [done.stdout.count(f"[{stage}/") for stage in (1, 10)] == [1, 1], "one rank speaks"
    assert len(took_part(tmp_path)) == ranks
    assert published(tmp_path) == published(alone)


def test_an_error_on_any_rank_ends_all_with_one_message(config: Path, alone: Path, tmp_path: Path) -> None:
    """Restores the damaged input afterwards: the next run publishes the same as an undisturbed one."""
    run_dir = spoilt(alone, tmp_path)
    done = start(command(config, f"run.dir={run_dir}", ranks=2))
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and "error: stage score, task " in lines[0] and lines[1].startswith("(details: "), lines
    assert "ZSTD decompress failed" in Path(lines[0].rpartition("its log: ")[2]).read_text()
    for shard in ends(run_dir):
        shard.write_bytes((alone / shard.relative_to(run_dir)).read_bytes())
    assert main([str(config), f"run.dir={run_dir}"]) == 0
    assert published(run_dir) == published(alone)


@pytest.mark.full
def test_an_interrupted_mpirun_ends_at_once(config: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(config, f"run.dir={tmp_path}", ranks=3),
        env=environment(),
        stdin=subprocess.PIPE,  # stays open, and nothing is written to it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob(".extract.*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.count("interrupted; run the same command again to go on") == 1 and "Traceback" not in said


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no ray here; pip install -c constraints.txt ray")
def test_ray(config: Path, alone: Path, tmp_path: Path) -> None:
    args = [f"run.dir={tmp_path}", "--executor", "ray", "run.ray.mem_per_cpu_gb=0.5"]
    done = start(command(config, *args, "run.ray.mem_per_cpu_gb=1e6"))
    assert done.returncode == 2 and "no node of the Ray cluster with so many cores" in done.stderr
    done = start(command(config, *args))
    assert done.returncode == 0, done.stderr
    assert published(tmp_path) == published(alone)
    done = start(command(config, *args, f"run.dir={spoilt(alone, tmp_path / 'spoilt')}"))
    assert done.returncode == 1 and "error: stage score, task " in done.stderr


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as conf:
        patch.setenv("SLURM_CONF", str(conf))
        yield


def slurm_args(run_dir: Path, *more: str) -> list[str]:
    small = ("run.workers=4", "run.slurm.mem_per_cpu_gb=1", "run.slurm.time=00:10:00", "run.slurm.tasks_per_job=3")
    return [f"run.dir={run_dir}", "--executor", "slurm", *small, *more]


def queue(states: str = "") -> list[str]:
    only = [f"--states={states}"] if states else []
    done = subprocess.run(["squeue", "--noheader", "--format=%j", *only], capture_output=True, text=True, check=True)
    return done.stdout.split()


def drain(state: str) -> None:
    subprocess.run(["scontrol", "update", "nodename=n1,n2", f"state={state}", "reason=test"], check=True)


def wait_for_queue(filled: bool, states: str = "") -> None:
    deadline = time.monotonic() + 60
    while bool(queue(states)) != filled:
        assert time.monotonic() < deadline, queue()
        time.sleep(0.5)


@pytest.mark.full
@pytest.mark.skipif(bool(slurm_cluster.WHY_NOT), reason=slurm_cluster.WHY_NOT)
@pytest.mark.usefixtures("cluster")
class TestSlurm:
    def test_a_whole_run(self, config: Path, tmp_path: Path) -> None:
        # In this config stages have several passes, whose titles have a space.
        lines, alone, run = "lines.max_copies=2", tmp_path / "alone", tmp_path / "slurm"
        assert start(command(config, f"run.dir={alone}", lines)).returncode == 0
        done = start(command(config, *slurm_args(run, "run.slurm.max_array_size=3", lines)))
        assert (done.returncode, done.stderr) == (0, "")
        outputs = [path.read_text() for path in run.glob("logs/**/slurm_logs/*.out")]
        assert len(outputs) >= 10 and len(took_part(run)) >= 10
        assert published(run) == published(alone)
        wait_for_queue(filled=False)
        assert not list(run.glob("logs/**/slurm_name"))

    def test_a_tasks_error(self, config: Path, alone: Path, tmp_path: Path) -> None:
        run_dir = spoilt(alone, tmp_path)
        done = start(command(config, *slurm_args(run_dir)))
        assert done.returncode == 1 and "error: stage score, task " in done.stderr
        assert "ZSTD decompress failed" in Path(done.stderr.splitlines()[0].rpartition("its log: ")[2]).read_text()
        wait_for_queue(filled=False)

    def test_a_refused_job(self, config: Path, tmp_path: Path) -> None:
        done = start(command(config, *slurm_args(tmp_path, "run.slurm.partition=gpus")))
        assert done.returncode == 2
        assert "invalid partition specified: gpus" in done.stderr and "correct run.slurm" in done.stderr

    @pytest.mark.parametrize("running", [False, True])
    def test_a_lost_element_is_an_error(self, config: Path, tmp_path: Path, running: bool) -> None:
        """Cancels an element of a job array, which leaves no message of its own, as after the failure of its node."""
        if not running:
            drain("drain")
        args = slurm_args(tmp_path, "run.slurm.setup=echo set up; sleep 600")
        process = subprocess.Popen(command(config, *args), env=environment(), stderr=subprocess.PIPE, text=True)
        wait_for_queue(filled=True, states="RUNNING" if running else "PENDING")
        while running and not any(out.stat().st_size for out in tmp_path.glob("logs/*/slurm_logs/*_0.out")):
            assert process.poll() is None
            time.sleep(0.1)
        subprocess.run(["scancel", f"--name={queue()[0]}"], check=True)
        _, said = process.communicate(timeout=slurm._SETTLE_SECONDS + 60)
        if not running:
            drain("resume")
        assert process.returncode == 1
        assert "error: stage extract, task 0 of " in said and "_0 ended as CANCELLED" in said
        assert ("  set up\n" in said) == running

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_an_interrupted_run_cancels_its_jobs(
        self, config: Path, tmp_path: Path, number: signal.Signals, status: int
    ) -> None:
        process = subprocess.Popen(command(config, *slurm_args(tmp_path)), env=environment())
        wait_for_queue(filled=True)
        process.send_signal(number)
        assert process.wait(60) == status
        wait_for_queue(filled=False)

    def test_a_killed_runs_jobs_are_cancelled_by_the_next(self, config: Path, alone: Path, tmp_path: Path) -> None:
        process = subprocess.Popen(
            command(config, *slurm_args(tmp_path, "run.slurm.setup=sleep 600")), env=environment()
        )
        wait_for_queue(filled=True)
        process.kill()
        process.wait()
        assert queue()
        assert main([str(config), f"run.dir={tmp_path}"]) == 0
        wait_for_queue(filled=False)
        assert published(tmp_path) == published(alone)


def ends(run_dir: Path) -> list[Path]:
    """Returns the first and the last shard, which belong to different tasks."""
    folder = run_dir / "extract"
    shards = shards_under(folder)
    return [shard_path(folder, shards[0]), shard_path(folder, shards[-1])]


def spoilt(run_dir: Path, folder: Path) -> Path:
    """Copies a finished run without its stage `score`, and damages a shard of two of that stage's tasks."""
    copy = folder / "run"
    shutil.copytree(run_dir, copy)
    (copy / "score" / "stage.json").unlink()
    for shard in ends(copy):
        shard.write_bytes(b"?" * shard.stat().st_size)
    return copy
