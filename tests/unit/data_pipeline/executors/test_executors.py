"""Tests executors with a pipeline of one step: failures, lost workers, refusals. Whole runs are in tests/e2e."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from rich.console import Console

from configs.data import DataConfig
from configs.data_run import DataRunConfig, RayConfig, SlurmConfig
from configs.loader import ConfigError, load
from data_pipeline.executors.base import PipelineJob
from data_pipeline.executors.choose import choose
from data_pipeline.executors.local_executor import LocalExecutor
from data_pipeline.executors.rank_output import output_of_rank_0_only
from data_pipeline.executors.slurm_executor import SlurmTasks, cancel_leftovers
from data_pipeline.executors.stage_tasks import TaskError, claim, prepare, quiet
from tests.data_runs import command, environment

ROOT = Path(__file__).parents[4]
SECRET = "someone@example.org"


class MarkStep(PipelineStep):
    """Step that writes a file per rank; `trouble` maps a rank to the failure that happens there instead."""

    name, type = "Mark", "TEST"

    def __init__(self, out: str, trouble: dict[int, str] | None = None) -> None:
        super().__init__()
        self.out = out
        self.trouble = trouble or {}
        self.seen = 0

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.seen += 1
        text = SECRET
        match self.trouble.get(rank):
            case "value":
                raise ValueError("the file is unusable; repair it")
            case "defect":
                raise KeyError("column")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crowded":  # as the kernel does where memory is enough for one task alone
                try:
                    Path(self.out, "at work").mkdir()
                except FileExistsError:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.3)
                Path(self.out, "at work").rmdir()
        Path(self.out, str(rank)).write_text(f"{rank} of {world_size}, {self.seen}, {os.getpid()}, {len(text)}")
        yield from ()


def perform(executor: LocalExecutor, folder: Path, tasks: int, trouble: dict[int, str] | None = None) -> Path:
    logs, out = folder / "logs", folder / "out"
    logs.mkdir()
    out.mkdir()
    executor.perform("marking", [MarkStep(str(out), trouble)], tasks, logs, 1, Console(quiet=True))
    return out


@pytest.mark.parametrize(("workers", "method"), [(1, "fork"), (3, "fork"), (2, "spawn")])
def test_every_task_is_run_once_and_afresh(tmp_path: Path, workers: int, method: str) -> None:
    with LocalExecutor(workers, method) as executor:
        for stage in ("first", "second"):
            (tmp_path / stage).mkdir()
            out = perform(executor, tmp_path / stage, tasks=7)
            marks = [(out / str(rank)).read_text().split(", ") for rank in range(7)]
            assert [mark[:2] for mark in marks] == [[f"{rank} of 7", "1"] for rank in range(7)]
            pids = {int(mark[2]) for mark in marks}
            assert (os.getpid() in pids) == (workers == 1)
            assert (tmp_path / stage / "logs" / "task_00006.log").is_file()
    assert workers == 1 or not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({2: "value"}, "stage marking, task 2 of 5: the file is unusable; repair it; its log: "),
        ({1: "defect"}, "stage marking, task 1 of 5: KeyError: 'column'; its log: "),
    ],
)
def test_a_tasks_error_comes_with_its_rank_and_log(
    tmp_path: Path, workers: int, trouble: dict[int, str], said: str
) -> None:
    with LocalExecutor(workers) as executor, pytest.raises(TaskError, match=re.escape(said)) as caught:
        perform(executor, tmp_path, 5, trouble)
    log = Path(str(caught.value).rpartition("its log: ")[2]).read_text()
    assert "Traceback" in log and "in run" in log
    for path in (tmp_path / "logs").rglob("*"):
        assert path.is_dir() or SECRET not in path.read_text(), (
            "a log shows a variable's value, which may be a document"
        )


def test_a_killed_worker_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    with LocalExecutor(2) as executor, pytest.raises(TaskError, match=r"task 3 of 6: .* signal 9 .*lower run\.workers"):
        perform(executor, tmp_path, 6, {3: "killed"})
    again = tmp_path / "again"
    again.mkdir()
    with LocalExecutor(1) as executor:
        assert len(list(perform(executor, again, 6).iterdir())) == 6


def test_fewer_workers_help_where_too_many_were_killed_for_their_memory(tmp_path: Path) -> None:
    crowded = dict.fromkeys(range(4), "crowded")
    with LocalExecutor(2) as executor, pytest.raises(TaskError, match=r"signal 9 .*: lower run\.workers"):
        perform(executor, tmp_path, 4, crowded)
    (tmp_path / "less").mkdir()
    with LocalExecutor(1) as executor:
        assert len(list(perform(executor, tmp_path / "less", 4, crowded).iterdir())) == 4


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """Kills the parent alone, while its workers run a task that would take a minute."""
    script = f"""
import os, sys, time
from pathlib import Path
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from rich.console import Console
from data_pipeline.executors.local_executor import LocalExecutor
class Wait(PipelineStep):
    name = type = "wait"
    def run(self, data=None, rank=0, world_size=1):
        Path({str(tmp_path)!r}, f"pid{{rank}}").write_text(str(os.getpid()))
        time.sleep(60)
        yield from ()
if __name__ == "__main__":
    logs = Path({str(tmp_path)!r}, "logs")
    logs.mkdir()
    with LocalExecutor(3) as executor:
        executor.perform("wait", [Wait()], 3, logs, 1, Console(quiet=True))
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    files = [tmp_path / f"pid{rank}" for rank in range(3)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files), 60)
    process.kill()
    process.wait()
    wait_for(lambda: not any(Path("/proc", file.read_text()).exists() for file in files), 10)


def wait_for(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_task_is_never_started_twice(tmp_path: Path) -> None:
    """Starts a task again, as a scheduler does that lost a node: steps that append would write lines twice."""
    prepare(tmp_path)
    assert claim(tmp_path, 4)
    assert not claim(tmp_path, 4)
    tasks = SlurmTasks(PipelineJob("s", [MarkStep(str(tmp_path))], 5, tmp_path), "name", SlurmConfig(), 2, [])
    with pytest.raises(TaskError, match=rf"started a second time, so process {os.getpid()} on .* was lost"):
        tasks.run_once(4)
    assert not (tmp_path / "4").exists()


def test_the_sbatch_script(tmp_path: Path) -> None:
    options = SlurmConfig(partition="cpu", time="1-00:00:00", mem_per_cpu_gb=3, account="lab", setup="module load x")
    tasks = SlurmTasks(PipelineJob("score", [], 9, tmp_path), "trivium-score-1", options, 4, [])
    script = tasks.get_launch_file_contents(tasks.get_sbatch_args(9), "true")
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))
    logs = f"{tmp_path}/slurm_logs/%A_%a.out"
    assert directives == {
        "partition": "cpu",
        "time": "1-00:00:00",
        "mem-per-cpu": "3G",
        "cpus-per-task": "1",
        "nodes": "1",
        "account": "lab",
        "array": "0-8%4",
        "job-name": "trivium-score-1",
        "output": logs,
        "error": logs,
        "no-requeue": "",
    }
    ran = subprocess.run(
        ["bash", "-c", script.replace("module load x", "true") + "\ntype -p python; echo $PYTHONPATH"],
        capture_output=True,
        text=True,
        check=True,
    )
    python, path = ran.stdout.splitlines()[-2:]
    assert Path(python).parent == Path(sys.executable).parent and path.split(":")[0] == str(ROOT)


def test_executors_that_are_not_here_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"sbatch, which is not on PATH; run where .*, or use --executor local"):
        choose(DataRunConfig(dir="x", executor="slurm"))
    assert isinstance(choose(DataRunConfig(dir="x", executor="local")), LocalExecutor)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs the package ray; run: pip install -c constraints\.txt '\.\[ray\]'"):
        choose(DataRunConfig(dir="x", executor="ray", ray=RayConfig()))
    (tmp_path / "score.1").mkdir()
    record = tmp_path / "score.1" / "slurm_name"
    record.write_text("trivium-score-1")
    cancel_leftovers(tmp_path)  # there is no scancel here: nothing is done or printed
    assert not record.exists()


def test_slurm_is_used_where_its_commands_are_and_paths_have_no_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sbatch", "squeue", "scancel", "scontrol"):  # a Slurm that refuses every job
        (tmp_path / name).write_text("#!/bin/sh\necho no such partition >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    executor = choose(DataRunConfig(dir="x", executor="slurm"))
    for folder, said in (
        ("my run", "set run.dir to a path without spaces"),
        ("run", "and the message above; correct run.slurm"),
    ):
        prepare(tmp_path / folder)
        with pytest.raises(ConfigError, match=re.escape(said)):
            executor.run(PipelineJob("s", [MarkStep(str(tmp_path))], 2, tmp_path / folder), print)


def test_the_flag_and_the_key_say_who_does_the_tasks(tmp_path: Path) -> None:
    assert isinstance(choose(DataRunConfig(dir="x")), LocalExecutor)
    done = data_run("configs/data/demo.toml", "run.executor=ray", "--executor", "slrm", f"run.dir={tmp_path}")
    assert done.returncode == 2
    assert "run.executor = 'slrm': input should be 'local', 'slurm', 'ray' or 'mpi'" in done.stderr
    with pytest.raises(ConfigError, match=r"run\.slurm\.time: '1 day' is no time limit"):
        load(DataConfig, ROOT / "configs/data/demo.toml", ["run.slurm.time=1 day"])


def test_one_of_many_ranks_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setenv("MPI_LOCALRANKID", "0")
    monkeypatch.setenv("PMI_RANK", "0")
    with pytest.raises(ConfigError, match=r"run\.executor = local runs from one process, and 3 ranks were started"):
        choose(DataRunConfig(dir="x", executor="local"))
    with monkeypatch.context() as one:
        for name in ("PMI_SIZE", "MPI_LOCALRANKID", "PMI_RANK"):
            one.delenv(name)
        assert isinstance(choose(DataRunConfig(dir="x", executor="local")), LocalExecutor)
    with pytest.raises(ConfigError, match="said once"), output_of_rank_0_only():
        raise ConfigError("said once")
    monkeypatch.setenv("PMI_RANK", "2")
    with pytest.raises(SystemExit) as ended, output_of_rank_0_only():
        print("argparse prints too")
        raise ConfigError("said once")
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "")


def test_an_mpi_library_of_the_cluster_is_loaded_once_the_library_path_names_its_folder() -> None:
    """Loads the library of the package mpich, which mpi4py finds by itself only in its own environment."""
    folder = Path(sys.prefix, "lib")
    if not (folder / "libmpi.so").exists():
        pytest.skip("no MPI library in this Python's environment")
    load = (
        "import sys\nsys.exec_prefix = sys.base_exec_prefix\n"
        "from data_pipeline.executors.mpi_executor import _load\nprint(_load().Get_library_version())"
    )

    def loaded(**more: str) -> subprocess.CompletedProcess[str]:
        ours = environment(**{"LD_LIBRARY_PATH": "", **more})
        return subprocess.run([sys.executable, "-c", load], env=ours, capture_output=True, text=True, timeout=120)

    alone = loaded()
    if alone.returncode == 0:  # the system has a library where every program finds it
        assert alone.stdout and not alone.stdout.startswith("MPICH"), alone.stdout
    else:
        said = alone.stderr.splitlines()[-1]
        assert "run: pip install -c constraints.txt mpich, or put the folder of the cluster's own libmpi.so on" in said
        assert said.split()[-1] == "LD_LIBRARY_PATH"
    done = loaded(LD_LIBRARY_PATH=str(folder))
    assert done.stdout.startswith("MPICH"), done.stderr


def test_ranks_of_another_mpi_than_ours_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts ranks by an mpirun of another MPI library than mpi4py's, with which each rank sees a world of one rank."""
    ours = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    done = data_run("configs/data/demo.toml", f"run.dir={tmp_path}", env=ours)
    # Where /sys is missing, MPI's own libraries complain first, one on each stream.
    out, said = ([line for line in text.splitlines() if "sys" not in line] for text in (done.stdout, done.stderr))
    assert (done.returncode, out) == (2, [])
    assert len(said) == 1 and said[0].startswith("error: 2 ranks were started, but MPI sees 1")
    assert not list(tmp_path.iterdir())
    assert "use that library's mpirun" in said[0]
    # Under its own mpirun, ranks that were told to use another executor are told of the one that works.
    with monkeypatch.context() as patch, pytest.raises(ConfigError) as refused:
        for name, value in (("PMI_SIZE", "2"), ("PMI_RANK", "0"), ("MPI_LOCALRANKID", "0")):
            patch.setenv(name, value)
        choose(DataRunConfig(dir="x", executor="local"))
    option = str(refused.value).rpartition("use ")[2].split()
    beside = command(Path("configs/data/demo.toml"), *option, "--dry-run", f"run.dir={tmp_path}", ranks=2)
    done = subprocess.run(beside, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def data_run(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "data_pipeline.command", *args],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


class Talk(PipelineStep):
    """Step that writes its rank to the log and to stderr."""

    name, type = "Talk", "TEST"

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        logger.info(f"logged by {rank}")
        print(f"printed by {rank}", file=sys.stderr)
        yield from ()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_task_says_is_in_its_log_alone(tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    with LocalExecutor(workers) as executor:
        executor.perform("talk", [Talk()], 3, logs, 1, Console(quiet=True))
    quiet(tmp_path / "outside.log")
    logger.info("between stages")
    quiet(None)
    logger.info("nowhere")
    for rank in range(3):
        said = (logs / f"task_{rank:05d}.log").read_text()
        found = re.findall(r"(?:logged|printed) by \d", said)
        assert found == [f"logged by {rank}", f"printed by {rank}"]
    outside = (tmp_path / "outside.log").read_text()
    assert "between stages" in outside and "nowhere" not in outside
    assert capfd.readouterr() == ("", "")
