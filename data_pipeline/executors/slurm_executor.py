"""Runs tasks as Slurm array jobs, one array per stage, submitted and awaited from a login node.

datatrove's SlurmPipelineExecutor writes the pipeline to `executor.pik` in the stage's log folder (dill, a pickle), and
an sbatch script that loads it in each array element. No other pickle is read back, and this one within the same run by
the user who wrote it. Results are exchanged through the run directory, which all nodes must see. When the waiting
process ends early, its jobs are cancelled; if it was killed, the next run cancels them. Elements are not requeued: a
lost one ends the stage with an error.
"""

import contextlib
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from datatrove.executor.slurm import SlurmPipelineExecutor

from configs.data_run import SlurmConfig
from configs.loader import ConfigError
from data_pipeline.core.progress import SetNote
from data_pipeline.executors.base import Executor, PipelineJob
from data_pipeline.executors.stage_tasks import TaskError, Tasks, lost, ranks_in

_RECORD = "slurm_name"  # file with the name of a stage's jobs, which lets the next run cancel those of a killed one
_POLL_SECONDS = (1.0, 15.0)  # first and longest pause between queries; pauses grow to spare the controller
_SETTLE_SECONDS = 30.0  # how long an ended element's files may take to appear on a network file system
_SILENCE_SECONDS = 600.0  # how long the controller may be down before the run gives up
_TAIL_LINES = 5
_HINTS = {
    "TIMEOUT": "raise run.slurm.time",
    "OUT_OF_MEMORY": "raise run.slurm.mem_per_cpu_gb",
    "NODE_FAIL": "run the same command again",
}


class SlurmTasks(Tasks, SlurmPipelineExecutor):
    """A pipeline and its tasks, in the form that datatrove submits to Slurm.

    Leaves out options that a site may not have, unless the config sets them: QOS, account, partition. The number of
    each submitted array job is appended to `jobs`.
    """

    def __init__(self, job: PipelineJob, name: str, options: SlurmConfig, workers: int, jobs: list[str]) -> None:
        def note_number(said: str) -> str:
            jobs.append(re.findall(r"job (\d+)", said)[-1])
            return jobs[-1]

        super().__init__(
            list(job.steps),
            tasks=job.tasks,
            time=options.time,
            partition=options.partition or "",
            cpus_per_task=options.cpus_per_task,
            mem_per_cpu_gb=options.mem_per_cpu_gb,
            workers=workers,
            job_name=name,
            qos=options.qos or "",
            env_command=_environment(options.setup),
            sbatch_args={"account": options.account or "", "no-requeue": None},
            max_array_size=options.max_array_size,
            job_id_retriever=note_number,
            logging_dir=str(job.logs.absolute()),
            skip_completed=False,
            tasks_per_job=options.tasks_per_job,
            requeue=False,
            requeue_signals=None,
        )

    def get_sbatch_args(self, max_array: int = 1) -> dict:
        return {key: value for key, value in super().get_sbatch_args(max_array).items() if value != ""}

    def launch_merge_stats(self) -> None:
        """Does nothing; datatrove would submit another job per stage for a sum of statistics that nobody reads."""


class SlurmExecutor(Executor):
    """Runs tasks as Slurm array jobs of at most `workers` running elements.

    Raises ConfigError if Slurm's commands are not on PATH.
    """

    def __init__(self, options: SlurmConfig, workers: int) -> None:
        for command in ("sbatch", "squeue", "scancel", "scontrol"):
            if shutil.which(command) is None:
                raise ConfigError(
                    f"run.executor = slurm needs the command {command}, which is not on PATH; run where jobs are "
                    "submitted, or use --executor local"
                )
        self._options = options
        self.workers = workers

    def run(self, job: PipelineJob, set_note: SetNote) -> None:
        if re.search(r"\s", str(job.logs.absolute())):
            raise ConfigError(
                f"run.dir: a Slurm script cannot hold a path with spaces, and {job.logs.absolute()} has some; set "
                "run.dir to a path without spaces"
            )
        title = re.sub(r"\W+", "-", job.title)  # a script's directives end at a space
        name = f"trivium-{title}-{secrets.token_hex(4)}"
        jobs: list[str] = []
        record = job.logs / _RECORD
        with _signals_raise():
            record.write_text(name, encoding="utf-8")
            try:
                _submit(SlurmTasks(job, name, self._options, self.workers, jobs))
                self._wait(job, name, jobs, set_note)
            finally:
                if ranks_in(job.logs / "completions") != set(range(job.tasks)):
                    cancel(name)
                record.unlink(missing_ok=True)

    def _wait(self, job: PipelineJob, name: str, jobs: list[str], set_note: SetNote) -> None:
        """Waits until all tasks are done or one has written an error file.

        Raises TaskError if an element ended without either, or if Slurm's controller does not answer for 10 minutes.
        """
        pause, _ = _POLL_SECONDS
        last_answer = time.monotonic()
        gone_since: dict[int, float] = {}
        while not ranks_in(job.logs / "failed"):
            undone = sorted(set(range(job.tasks)) - ranks_in(job.logs / "completions"))
            if not undone:
                return
            now = time.monotonic()
            states = _queue(name)
            if states is not None:
                last_answer = now
                set_note(_count(states))
                gone = [rank for rank in undone if self._element(rank, jobs) not in states]
                gone_since = {rank: gone_since.get(rank, now) for rank in gone}
                for rank, since in gone_since.items():
                    if now - since > _SETTLE_SECONDS:
                        raise self._lost(job, rank, self._element(rank, jobs))
            elif now - last_answer > _SILENCE_SECONDS:
                raise TaskError(
                    f"stage {job.title}: Slurm's controller has not answered for {now - last_answer:.0f} s; run the "
                    "same command again when it does"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, _POLL_SECONDS[1])

    def _element(self, rank: int, jobs: Sequence[str]) -> str:
        """Slurm's name JOB_INDEX of the array element that runs a task."""
        index = rank // self._options.tasks_per_job
        return f"{jobs[index // self._options.max_array_size]}_{index % self._options.max_array_size}"

    def _lost(self, job: PipelineJob, rank: int, element: str) -> TaskError:
        """Makes the error for a task whose element ended without an error file, with its state and last output."""
        state = _final_state(element)
        reason = f"Slurm job {element} ended as {state}" + (f" ({_HINTS[state]})" if state in _HINTS else "")
        output = job.logs / "slurm_logs" / f"{element}.out"
        if output.is_file():
            tail = output.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            reason += f"; its output, {output}, ends with" + "".join(f"\n  {line}" for line in tail) + "\n"
        return lost(job.title, rank, job.tasks, job.logs, reason)


def cancel(name: str) -> None:
    """Cancels all Slurm jobs of this name; each stage of each run has a name of its own."""
    subprocess.run(["scancel", f"--name={name}"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def cancel_leftovers(logs: Path) -> None:
    """Cancels jobs that a killed run left in the queue, where they take up nodes for results that nobody reads."""
    for record in logs.glob(f"**/{_RECORD}"):
        if shutil.which("scancel"):
            cancel(record.read_text(encoding="utf-8"))
        record.unlink()


def _environment(setup: str) -> str:
    """Shell commands for the start of a job script: the config's `setup`, then PATH and PYTHONPATH of this process."""
    bin_folder = shlex.quote(str(Path(sys.executable).parent))
    root = shlex.quote(str(Path(__file__).resolve().parents[2]))
    paths = f'export PATH={bin_folder}:"$PATH" PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}"'
    return "\n".join(line for line in ("set -e", setup, paths) if line)


def _submit(tasks: SlurmTasks) -> None:
    """Submits a stage's jobs. Raises ConfigError if sbatch refuses them."""
    try:
        tasks.launch_job()
    except subprocess.CalledProcessError as error:
        raise ConfigError(
            f"sbatch refused a stage's job with status {error.returncode} and the message above; correct run.slurm"
        ) from None


def _queue(name: str) -> dict[str, tuple[str, str]] | None:
    """Maps JOB_INDEX to (state, reason) for elements that have not ended; None if the controller does not answer."""
    command = ["squeue", f"--name={name}", "--array", "--noheader", "--format=%i|%T|%r"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        return None
    rows = (line.split("|") for line in done.stdout.splitlines())
    return {element: (state, reason) for element, state, reason in rows}


def _count(states: Mapping[str, tuple[str, str]]) -> str:
    """Counts elements by state, as in `2 running, 6 pending (Resources)`."""
    counts = Counter(state.lower() for state, _ in states.values())
    reasons = {reason for state, reason in states.values() if state == "PENDING"}
    waits = f" ({', '.join(sorted(reasons))})" if reasons else ""
    return ", ".join(f"{count} {state}{waits if state == 'pending' else ''}" for state, count in sorted(counts.items()))


def _final_state(element: str) -> str:
    """State in which an element ended; "unknown" once the controller forgot it, after MinJobAge (5 minutes)."""
    for job in (element, element.partition("_")[0]):  # an element that never started has no record of its own
        command = ["scontrol", "show", "job", job]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if found := re.search(r"JobState=(\w+)", done.stdout):
            return found[1]
    return "unknown"


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise SystemExit inside the block, so that its jobs are cancelled, as with Ctrl-C."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
