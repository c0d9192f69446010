"""Interface of all executors: the number of workers, and `perform`, which runs a stage's tasks.

The leading process plans a stage, waits in `perform` until its tasks are done, and then counts and publishes. The
numbers of tasks and workers never change a result: steps divide files and shards by rank, and name their output after
the file or shard, not the rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from datatrove.pipeline.base import PipelineStep
from rich.console import Console

from data_pipeline.core.progress import SetNote, watch
from data_pipeline.executors.stage_tasks import check, prepare, quiet


@dataclass(frozen=True)
class PipelineJob:
    """One stage's pipeline, to be run once per task; `logs` is a new folder that all workers can see."""

    title: str
    steps: Sequence[PipelineStep]
    tasks: int
    logs: Path


class Executor(ABC):
    """Base class of executors; use it in a `with` block, at whose end its workers are stopped."""

    workers = 1  # how many tasks run at a time
    leads = True  # False in processes that only `serve`

    def __enter__(self) -> "Executor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None  # an executor that keeps workers between stages overrides this

    @abstractmethod
    def run(self, job: PipelineJob, set_note: SetNote) -> None:
        """Runs the tasks; returns when all are done, or when one has failed and the executor starts no more.

        A task that fails writes an error file, see `tasks`. Raises TaskError if a task was lost without one. `set_note`
        sets the text shown beside the progress bar.
        """

    def serve(self) -> int:
        """Runs tasks for the leading process until that ends the run, and returns an exit status.

        An executor whose processes all lead has none to run here.
        """
        return 0

    def perform(
        self, title: str, steps: Sequence[PipelineStep], tasks: int, logs: Path, total_bytes: int, console: Console
    ) -> None:
        """Runs `steps` in `tasks` tasks and shows their progress. Raises TaskError for the first failed task.

        `total_bytes` is the sum that the steps will report through `ProgressFile`, for the progress bar alone.
        """
        prepare(logs)
        quiet(logs / "executor.log")
        try:
            with watch(title, logs / "progress", total_bytes, console) as set_note:
                self.run(PipelineJob(title, steps, tasks, logs), set_note)
            check(title, tasks, logs)
        finally:
            quiet(None)
