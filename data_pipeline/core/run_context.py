"""Context that all stages of a data run get, and the two functions by which most of them read the run's texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from datatrove.pipeline.base import PipelineStep
from rich.console import Console

from configs.data import DataConfig
from data_pipeline.core.ledger import Tally
from data_pipeline.core.shards import ShardReader, shard_path, shards_under
from data_pipeline.core.tables import count_verdicts

COMPILED_ONCE = "Compiled here once, then found in its cache by every worker."
_TASKS_PER_WORKER = 4  # so that a slow task leaves the other workers something to do


class PipelineRunner(Protocol):
    """The part of an executor that stages use; `executors.base.Executor` implements and documents it."""

    workers: int

    def perform(
        self, title: str, steps: Sequence[PipelineStep], tasks: int, logs: Path, total_bytes: int, console: Console
    ) -> None: ...


@dataclass(frozen=True)
class RunContext:
    """Context of a data run that every stage gets: its config, run directory, console, and executor."""

    config: DataConfig
    run_dir: Path
    console: Console
    executor: PipelineRunner

    def pipeline(
        self,
        name: str,
        logs: Path,
        steps: Sequence[PipelineStep],
        units: int,
        total_bytes: int,
        alone: bool = False,
    ) -> None:
        """Runs `steps` over `units` files or shards, split into parallel tasks, or in a single task if `alone`.

        `total_bytes` is the expected input, for the progress bar alone.
        """
        tasks = 1 if alone else max(1, min(units, _TASKS_PER_WORKER * self.executor.workers))
        self.executor.perform(name, steps, tasks, logs, total_bytes, self.console)

    def text_bytes(self) -> int:
        """Estimates the bytes of all texts that the extract stage published, for progress bars."""
        extract = self.run_dir / "extract"
        size = sum(shard_path(extract, shard).stat().st_size for shard in shards_under(extract))
        return 3 * size  # Zstandard compresses prose to about a third


def read_texts(
    context: RunContext, name: str, steps: Sequence[PipelineStep], logs: Path, shards: Sequence[str]
) -> None:
    """Runs datatrove `steps` over the documents of `shards`, read as the extract stage published them."""
    reader = ShardReader(str(context.run_dir / "extract"), shards, str(logs / "progress"))
    context.pipeline(name, logs, [reader, *steps], len(shards), context.text_bytes())


def scan_texts(
    context: RunContext, name: str, make_step: Callable[[str], PipelineStep], folder: Path, logs: Path
) -> Tally:
    """Runs one step, which writes tables to `folder`, over all texts of the extract stage; returns its counts.

    `make_step` gets the folder in which the tasks save their tallies.
    """
    tallies = logs / "tallies"
    read_texts(context, name, [make_step(str(tallies))], logs, shards_under(context.run_dir / "extract"))
    tally = Tally.load_all(tallies)
    count_verdicts(folder, tally)
    return tally
