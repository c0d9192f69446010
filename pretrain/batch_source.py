"""Batches: rows of a batch source, stacked into tensors, and who trains on which sample.

Sample i is a pure function of the source and i. Micro-batch j of a step holds samples [first + j*m, first + (j+1)*m)
for micro-batch size m, and data-parallel rank r takes the r-th contiguous share of the step's micro-batches: neither
ranks nor micro-batches change what a step trains on.
"""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.differences import changes, words
from data_pipeline.core.integrity import Expected
from data_pipeline.mixture import earlier
from data_pipeline.mixture.rows import Plan, Row
from pretrain.model.batch import Batch


def collate(rows: Sequence[Row], first: int | None = None) -> Batch:
    """Stacks rows of equal length; the first is sample `first` of the run, if they are numbered."""

    def stack(name: str, dtype: Any) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows]).astype(dtype))

    loss_mask = stack("loss_mask", np.float32)
    return Batch(
        tokens=stack("tokens", np.int64),
        labels=stack("labels", np.int64),
        loss_mask=loss_mask,
        positions=stack("positions", np.int64),
        segments=stack("segments", np.int64),
        sources=torch.tensor([row.source for row in rows]),
        trained=loss_mask.flatten().nonzero()[:, 0],
        samples=None if first is None else tuple(range(first, first + len(rows))),
        advantages=stack("advantages", np.float32) if hasattr(rows[0], "advantages") else None,
        logprobs=stack("logprobs", np.float32) if hasattr(rows[0], "logprobs") else None,
    )


def micro_batches(rows: Sequence[Row], micro_batch_size: int, first: int | None = None) -> list[Batch]:
    """Consecutive rows, of which the first is sample `first` of the run, if they are numbered."""
    return [
        collate(rows[i : i + micro_batch_size], None if first is None else first + i)
        for i in range(0, len(rows), micro_batch_size)
    ]


def share_of_rank(first: int, count: int, dp_rank: int, dp: int) -> range:
    """The samples of [first, first + count) that data-parallel rank `dp_rank` trains on."""
    share = count // dp
    return range(first + dp_rank * share, first + (dp_rank + 1) * share)


class BatchSource(abc.ABC):
    """Where samples come from. Pretraining reads a plan, SFT its dialogues; RL makes them with the current model."""

    fingerprint: str  # changes when any sample would
    num_samples: int | None  # None: as many as asked for
    sources: list[str]  # what `Row.source` indexes; losses are reported for each
    first_sample: int = 0  # of the run, that is this source's first: earlier ones were of the source `after`
    after: str | None = None  # its fingerprint
    location: str | None = None  # where a plan is, for tools that look up what a step was trained on
    same: Mapping[str, int] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """What the data are, as JSON: kept in checkpoints, so that `difference` can tell what has changed."""
        return {}

    def difference(self, before: Mapping[str, Any]) -> str:
        """In words, from the `facts` of data with another fingerprint; they are empty where nothing is known."""
        said = words(changes(before, self.facts)) if before else []
        return "; ".join(said) or "the checkpoint does not say what is different about them"

    def note_use(self, run_dir: Path) -> None:  # noqa: B027  most sources need nothing
        """Called on one rank before training: leaves a note beside data that others might remove. Errors: OSError."""

    def prepare(self, engine: Any, step: int) -> None:  # noqa: B027  most sources need nothing
        """Called on all ranks before the rows of a step are asked for; RL takes the current weights here."""

    def files(self) -> list[Expected]:
        """The files that its rows are read from, as they were written; none where no checksums are known."""
        return []

    @abc.abstractmethod
    def rows(self, samples: range) -> Sequence[Row]:
        """This data-parallel rank's samples of a step. All ranks of a replica ask for the same."""

    def step_metrics(self) -> dict[str, tuple[float, float]]:
        """{name: (sum, count)} of this rank's rows since last asked; the same names on every rank."""
        return {}


class PlanSource(BatchSource):
    """Rows of a mixture plan; see `data_pipeline.mixture.rows.Plan`."""

    def __init__(self, plan: Plan, same: Mapping[str, int] | None = None):
        self.plan, self.same = plan, same or {}
        self.fingerprint, self.num_samples, self.sources = plan.fingerprint, plan.num_samples, list(plan.sources)
        self.first_sample, self.after, self.location = plan.first_sample, plan.after, str(plan.path)

    def files(self) -> list[Expected]:
        return self.plan.store_files()

    @property
    def facts(self) -> dict[str, Any]:
        return self.plan.facts

    def difference(self, before: Mapping[str, Any]) -> str:
        return earlier.differences(before, self.facts) if before else super().difference(before)

    def note_use(self, run_dir: Path) -> None:
        earlier.note_use(self.plan.path, run_dir)

    def rows(self, samples: range) -> list[Row]:
        return [self.plan.row(i - self.first_sample) for i in samples]
