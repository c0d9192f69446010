"""Batch sources, which give training samples by number, and the assignment of samples to ranks and micro-batches.

Sample i is a pure function of the source and i. Micro-batch j of a step holds samples [first + j*m, first + (j+1)*m)
for micro-batch size m, and data-parallel rank r takes the r-th contiguous share of the step's micro-batches. So a step
trains on the same samples whatever the number of ranks and the micro-batch size.
"""

import abc
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from configs.differences import changes, words
from configs.loader import ConfigError
from configs.train import SpikesConfig, TrainSection
from data_pipeline.core.integrity import Expected
from data_pipeline.mixture import earlier
from data_pipeline.mixture.rows import Plan, Row
from pretrain.model.batch import Batch
from pretrain.model.documents import Documents

T = TypeVar("T")
_FIM_SYMBOLS = 3  # positions of the symbols of a document that is rearranged for fill-in-the-middle
_SHOWN = 3  # documents of a row that are named
_HASH = re.compile(r" \([0-9a-f]{8,64}\)|^[0-9a-f]{12,64}$")  # as in `2,287 examples (1f3a90bc)`


def collate(rows: Sequence[Any], first: int | None = None) -> Batch:
    """Stacks rows of equal length into one micro-batch. `first` is the number of the first row's sample in the run.

    Rows may also have `extra`, arrays [L] by name, the same names in every row, and `experts`, see `Batch.experts`.
    """

    def stack(name: str, dtype: Any) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(row, name) for row in rows]).astype(dtype))

    loss_mask, segments = stack("loss_mask", np.float32), stack("segments", np.int64)
    documents = Documents.of(segments)
    return Batch(
        tokens=stack("tokens", np.int64),
        labels=stack("labels", np.int64),
        loss_mask=loss_mask,
        positions=stack("positions", np.int64),
        segments=segments,
        sources=torch.tensor([row.source for row in rows]),
        trained=loss_mask.flatten().nonzero()[:, 0],
        documents=documents,
        lengths=documents.lengths().view_as(segments),
        samples=None if first is None else tuple(range(first, first + len(rows))),
        extra={
            name: torch.from_numpy(np.stack([row.extra[name] for row in rows]).astype(np.float32))
            for name in getattr(rows[0], "extra", ())
        },
        experts=None if getattr(rows[0], "experts", None) is None else stack("experts", np.int16),
    )


def micro_batches(rows: Sequence[Row], micro_batch_size: int, first: int | None = None) -> list[Batch]:
    """Splits consecutive rows into micro-batches. `first` is the number of the first row's sample in the run."""
    return [
        collate(rows[i : i + micro_batch_size], None if first is None else first + i)
        for i in range(0, len(rows), micro_batch_size)
    ]


def share_of_rank(first: int, count: int, dp_rank: int, dp: int) -> range:
    """Returns which of the samples [first, first + count) data-parallel rank `dp_rank` of `dp` trains on."""
    share = count // dp
    return range(first + dp_rank * share, first + (dp_rank + 1) * share)


def in_random_order(rows: Sequence[T], samples: range, seed: int) -> list[T]:
    """Returns the rows of `samples`, which count through all epochs; each epoch has a random order of its own."""
    picked: list[T] = []
    epoch, order = -1, np.empty(0, dtype=np.int64)
    for i in samples:
        if i // len(rows) != epoch:
            epoch = i // len(rows)
            order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        picked.append(rows[order[i % len(rows)]])
    return picked


def longest_in(rows: Sequence[Row]) -> int:
    """Returns the number of tokens of the longest text in packed rows, whose positions begin anew with each text."""
    return max((int(row.positions.max()) + 1 for row in rows), default=0)


def with_contexts(row: Row, seed: int, sample: int) -> Row:
    """Takes the loss from the first tokens of each segment, a number drawn evenly from all that leave one to train on.

    So models learn to see a context both ways (prefix language models: Raffel et al. 2020, section 3.3.1). The numbers
    depend on seed and sample alone.
    """
    draw, loss_mask = np.random.default_rng([seed, sample]), row.loss_mask.copy()
    for segment in range(int(row.segments.max()) + 1):
        (trained,) = np.nonzero((row.segments == segment) & row.loss_mask)
        if len(trained):
            loss_mask[trained[: draw.integers(len(trained))]] = False
    return replace(row, loss_mask=loss_mask)


def _in_words(key: str, before: Any, after: Any) -> str:
    """Says how a fact of the data has changed. Hashes, which tell a reader nothing, are left out."""
    then, now = (_HASH.sub("", value) if isinstance(value, str) else value for value in (before, after))
    if then != now and "" not in (then, now):
        return words({key: (then, now)})[0]
    return f"{key} differs in content" + (f", with {now} as before" if now else "")


class BatchSource(abc.ABC):
    """Base class of the origins of samples: pretraining reads a plan, SFT its dialogues, RL samples from the model."""

    fingerprint: str  # identifies the samples: it changes when any of them does
    num_samples: int | None  # None: there is no end
    sources: list[str]  # names that `Row.source` indexes; the loss is logged for each
    first_sample: int = 0  # number in the run of this source's first sample; earlier samples came from `after`
    after: str | None = None  # fingerprint of the source that this one continues
    location: str | None = None  # folder of the plan, for tools that look up what a step was trained on
    # Tokens of the longest text in a row, or in those up to now where rows are sampled; None if as long as rows.
    longest_text: int | None = None
    # Whether `rows` depends on its samples alone, and calls no collectives, so that a thread may call it ahead of time.
    reads_ahead: bool = False
    # Whether another process makes the rows while the run trains, so that they may not be there yet.
    can_be_awaited: bool = False
    # Fingerprints of other sources, with how many of the run's first samples are the same in them as in this one.
    common_samples: Mapping[str, int] = {}

    def is_awaited(self, step: int) -> bool:
        """Returns whether the rows of the step after `step` steps are not there yet."""
        return False

    @property
    def facts(self) -> dict[str, Any]:
        """JSON values that describe the data; checkpoints keep them, so that `difference` can tell what has changed."""
        return {}

    def difference(self, before: Mapping[str, Any]) -> str:
        """Describes how the data differ from data with the facts `before`, which are empty if they are unknown."""
        found = changes(self.by_keys(before), self.by_keys(self.facts)) if before else {}
        described = [_in_words(key, *pair) for key, pair in found.items()]
        return "; ".join(described) or "the checkpoint does not say what is different about them"

    def by_keys(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns `facts` by the keys of the config that decide them, as messages name them."""
        return facts

    @property
    def following(self) -> Path | None:
        """Folder of the plan with which training goes on after this source's last sample, such as a next stage's."""
        return None

    @property
    def checkpoints(self) -> list[str]:
        """Folders of other runs' checkpoints that the source needs as long as the run goes on."""
        return []

    def context(self, seq_length: int) -> int:
        """Returns the tokens of the longest text in rows of `seq_length` tokens."""
        return seq_length if self.longest_text is None else self.longest_text

    def note_use(self, run_dir: Path) -> None:  # noqa: B027  most sources need nothing
        """Leaves a note beside the data that run `run_dir` uses them, or one on the data in the run's folder.

        The main rank calls it before training. Raises OSError if the note cannot be written.
        """

    def prepare(self, engine: Any, step: int) -> None:  # noqa: B027  most sources need nothing
        """Prepares the rows of step `step`; all ranks call it before `rows`. RL samples its rollouts here.

        The trainer has the first step prepared before it writes anything. Raises Failure if the run cannot go on.
        """

    def state(self) -> dict[str, Any]:
        """Returns JSON values that a checkpoint keeps, for sources whose rows depend on more than their number."""
        return {}

    def go_on(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:  # noqa: B027  most sources need nothing
        """Prepares to go on from a checkpoint with this manifest, whose `source` is what `state` returned then."""

    def files(self) -> list[Expected]:
        """Returns the files that rows are read from, with their checksums; empty if no checksums are known."""
        return []

    @abc.abstractmethod
    def rows(self, samples: range) -> Sequence[Row]:
        """Returns the rows of `samples`, this data-parallel rank's share of a step.

        All ranks of a model replica ask for the same samples.
        """

    def describe(self, sample: int, position: int | None = None) -> str:
        """Describes a sample: its number, and what is known of its origin, at `position` of its row if given."""
        return f"sample {sample:,}"

    def step_metrics(self) -> dict[str, tuple[float, float]]:
        """Returns {name: (sum, count)} of this rank's rows since the last call, with the same names on every rank."""
        return {}


class PlanSource(BatchSource):
    """Batch source that reads the rows of a mixture plan, see `data_pipeline.mixture.rows.Plan`."""

    reads_ahead = True

    def __init__(self, plan: Plan, common_samples: Mapping[str, int] | None = None, context_seed: int | None = None):
        """Reads `plan`; with `context_seed` a part of each document, drawn by it, is a context and not trained on."""
        self.plan, self.common_samples, self._context_seed = plan, common_samples or {}, context_seed
        self.fingerprint, self.num_samples, self.sources = plan.fingerprint, plan.num_samples, list(plan.sources)
        self.first_sample, self.after, self.location = plan.first_sample, plan.after, str(plan.path)

    def files(self) -> list[Expected]:
        return self.plan.store_files()

    @property
    def facts(self) -> dict[str, Any]:
        return self.plan.facts

    def difference(self, before: Mapping[str, Any]) -> str:
        if before and "mixture" not in before:
            return "they are no data plan"
        return earlier.differences(before, self.facts) if before else super().difference(before)

    @property
    def following(self) -> Path | None:
        return earlier.following(self.plan)

    def note_use(self, run_dir: Path) -> None:
        earlier.note_use(self.plan.path, run_dir)

    def describe(self, sample: int, position: int | None = None) -> str:
        segments = self.plan.provenance(sample - self.first_sample)
        end = 0
        for segment in segments:
            end += segment["length"] + (_FIM_SYMBOLS if "fim" in segment else 0)
            if position is not None and position < end:
                segments = [segment]
                break
        shown = ", ".join(segment["document_id"] for segment in segments[:_SHOWN])
        more = f" and {len(segments) - _SHOWN} more" if len(segments) > _SHOWN else ""
        return f"sample {sample:,} (source {segments[0]['source']}, {shown}{more})"

    def rows(self, samples: range) -> list[Row]:
        rows = ((i, self.plan.row(i - self.first_sample)) for i in samples)
        return [row if self._context_seed is None else with_contexts(row, self._context_seed, i) for i, row in rows]


def check_source(source: BatchSource, spikes: SpikesConfig) -> None:
    """Raises ConfigError if samples cannot be passed over, since the source makes them one step after another."""
    if source.reads_ahead or not (spikes.action == "rewind" or spikes.pass_over):
        return
    key = (
        'action = "rewind"' if spikes.action == "rewind" else f"pass_over = {[list(pair) for pair in spikes.pass_over]}"
    )
    raise ConfigError(
        f"spikes.{key} passes over samples, which a run that makes its samples while it trains cannot; set "
        "spikes.action=skip, and leave spikes.pass_over out"
    )


def check_samples(
    source: BatchSource, train: TrainSection, step: int, samples: int, checkpoint: Path | None = None, passed: int = 0
) -> None:
    """Raises ConfigError if the steps after `step`, when `samples` were used, need more samples than `source` has.

    `passed` are samples that these steps pass over, and `checkpoint` is the one that the run goes on from, if any.
    """
    if source.num_samples is None:
        return
    left = source.first_sample + source.num_samples - samples - passed
    lacking = (train.steps - step) * train.global_batch_size - left
    if lacking <= 0:
        return
    most, unused = step + left // train.global_batch_size, left % train.global_batch_size
    go_on = f", or then run `trivium data replan CONFIG --after {checkpoint} --out FOLDER`" if checkpoint else ""
    stage = "last mixture stage"
    if source.following is not None:
        stage = f"mixture stage {Path(source.location or '').name}"
        go_on += (
            "" if unused or most < 1 else f", or train to step {most} and then go on with data.plan={source.following}"
        )
    without = f", of which {passed:,} are passed over" if passed else ""
    fewer = f"set train.steps={most}, or " if most >= max(step, 1) else ""
    raise ConfigError(
        f"train.steps = {train.steps} needs {lacking:,} samples more than {source.location or 'the data'} has, which "
        f"are {source.num_samples:,}{without}; {fewer}raise mixture.samples in the data config (of its {stage}, "
        f"if it has stages) by {lacking:,} and run `trivium data run` again{go_on}"
    )
