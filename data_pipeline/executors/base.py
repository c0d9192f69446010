"""What a stage sees of whoever does its tasks: a number of workers, and `perform`.

The calling process plans a stage, waits here until its tasks are done, and then counts and publishes. Task and worker
counts never change a result: steps share out files and shards by rank, and their output is named after those.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from datatrove.pipeline.base import PipelineStep
from rich.console import Console

from data_pipeline.core.progress import Say, watch
from data_pipeline.executors.tasks import check, prepare, quiet


@dataclass(frozen=True)
class PipelineJob:
    """One stage's pipeline, to be run once for each of `tasks` ranks; `logs` is empty and all workers see it."""

    title: str
    steps: Sequence[PipelineStep]
    tasks: int
    logs: Path


class Executor(ABC):
    """A context: what it starts for a run is started by `with` or when first needed, and gone afterwards."""

    workers = 1  # tasks at a time
    leads = True  # False in processes that only `serve`

    def __enter__(self) -> "Executor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None  # for executors that hold nothing between stages

    @abstractmethod
    def run(self, job: PipelineJob, say: Say) -> None:
        """Runs the tasks and returns when all are done, or one has failed and none runs on.

        Errors: TaskError where a task could not say itself what became of it.
        """

    def serve(self) -> int:
        """Does tasks for the process that leads, until it is done. Returns an exit status."""
        raise AssertionError("a process that leads does not serve")

    def perform(
        self, title: str, steps: Sequence[PipelineStep], tasks: int, logs: Path, total_bytes: int, console: Console
    ) -> None:
        """Runs `steps` in `tasks` tasks and shows how far they are. Errors: TaskError for the first that failed.

        `total_bytes` is what the steps will report through `ProgressFile`, for the bar alone.
        """
        prepare(logs)
        quiet(logs / "executor.log")
        try:
            with watch(title, logs / "progress", total_bytes, console) as say:
                self.run(PipelineJob(title, steps, tasks, logs), say)
            check(title, tasks, logs)
        finally:
            quiet(None)
