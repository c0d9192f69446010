"""Batch source of distillation: rows of data, and in some steps completions that the student samples.

The teacher sees the rows of a step when they are asked for, which all ranks do together. What a step learns from
depends on its number alone: with a share lambda of steps on the student's own samples, step s, counted from 0, is one
of them if floor((s + 1) lambda) is above floor(s lambda).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.train import TrainSection
from data_pipeline.core.integrity import Expected
from posttrain.chat.format_interface import Chat
from posttrain.distillation.distill_loss import DistillLoss
from posttrain.distillation.teacher import Teacher
from posttrain.rl.policy_copy import PolicyCopy
from posttrain.rl.rollout import Rollout
from posttrain.rl.rollout_rows import rollout_rows
from posttrain.rl.shared_sampling import sample_together
from posttrain.tasks.task import Task
from pretrain.checkpoint.lineage import Pin
from pretrain.data.batch_source import BatchSource, micro_batches
from pretrain.heldout_loss import batches_of_rank
from pretrain.parallel.engine import Engine

OWN = "own samples"  # the source of what the student wrote
_PLAN = "data_plan"  # key of the plan's fingerprint in a checkpoint's `source`


@dataclass(frozen=True)
class StudentSampling:
    """The prompts that the student answers in steps on its own samples, which are `share` of all steps.

    `longest` is the number of tokens that a prompt and its completion may have.
    """

    task: Task
    chat: Chat
    share: float
    temperature: float
    seed: int
    longest: int

    def is_due(self, step: int) -> bool:
        """Whether a step, counted from 0, learns from samples."""
        return math.floor((step + 1) * self.share) > math.floor(step * self.share)


def plan_in(manifest: Mapping[str, Any]) -> str | None:
    """Returns the fingerprint of the plan whose rows a checkpoint's run has learnt; None if there is none."""
    found = manifest.get("source", {}).get(_PLAN)
    return None if found is None else str(found)


class DistillSource(BatchSource):
    """Batch source that lets the teacher, the model of `pin`, see every row.

    `data` is None if all steps learn from samples.
    """

    reads_ahead = False  # the teacher sees rows in the main thread, on all ranks together

    def __init__(
        self,
        data: BatchSource | None,
        sampling: StudentSampling | None,
        pin: Pin,
        train: TrainSection,
        policy: PolicyCopy,
    ) -> None:
        assert data is not None or (sampling is not None and sampling.share == 1)
        self._data, self._sampling, self._train, self._policy = data, sampling, train, policy
        self.sources = [*(data.sources if data else []), *([OWN] if sampling else [])]
        self.num_samples = data.num_samples if data else None
        self.location = data.location if data else None
        lengths = ([data.longest_text] if data else []) + ([sampling.longest] if sampling else [])
        known = [length for length in lengths if length is not None]
        self.longest_text = max(known) if len(known) == len(lengths) else None
        self._pin = pin
        self.teacher: Teacher | None = None  # until it has been read, which the ranks do together
        self.fingerprint = self._fingerprint(data.fingerprint if data else None)
        common = data.common_samples if data else {}
        self.common_samples = {self._fingerprint(plan): samples for plan, samples in common.items()}
        self._rollout: Rollout | None = None
        self._dp_rank = 0

    def _fingerprint(self, data: str | None) -> str:
        """Returns the fingerprint of a source like this one, on data of the fingerprint `data`."""
        sampling = self._sampling
        identity = {
            "data": data,
            "teacher": self._pin.sha256,
            "samples": sampling and {"task": sampling.task.facts, "share": sampling.share},
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """The teacher's checksum, the share of steps on samples, and the facts of the data."""
        share = self._sampling.share if self._sampling else 0.0
        return {
            "teacher": self._pin.sha256[:12],
            "on_policy": share,
            "data": self._data.facts if self._data else {},
            "task": self._sampling.task.facts if self._sampling else {},
        }

    @property
    def checkpoints(self) -> list[str]:
        return [self._pin.checkpoint]

    @property
    def following(self) -> Path | None:
        return self._data.following if self._data else None

    def by_keys(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        data, task = facts.get("data", {}), facts.get("task", {})
        return {
            "teacher": facts.get("teacher"),
            "distill.on_policy": facts.get("on_policy"),
            "data": data,
            "task": task,
        }

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {"teacher": {"checkpoint": self._pin.checkpoint, "sha256": self._pin.sha256}}
        return found | ({_PLAN: self._data.fingerprint} if self._data and self._data.location else {})

    def files(self) -> list[Expected]:
        return self._data.files() if self._data else []

    def note_use(self, run_dir: Path) -> None:
        if self._data:
            self._data.note_use(run_dir)

    def go_on(self, checkpoint: Path, manifest: Mapping[str, Any]) -> None:
        if self._data:
            self._data.go_on(checkpoint, manifest)

    def prepare(self, engine: Engine, step: int) -> None:
        """Samples the completions of a step that learns from them. Collective."""
        self._rollout, self._dp_rank = None, engine.mesh.dp_rank
        sampling = self._sampling
        if sampling is None or not sampling.is_due(step):
            return
        self._policy.refresh(engine)
        size = self._train.global_batch_size
        numbers = range(step * size, (step + 1) * size)
        self._rollout = sample_together(self._policy, sampling, numbers, 1, self._train.seq_length, scores=False)

    def rows(self, samples: range) -> Sequence[Any]:
        """Returns this data-parallel rank's rows of a step, after the teacher has seen them. Collective."""
        if self._rollout is None:
            assert self._data is not None
            rows = self._data.rows(samples)
        else:
            first = self._dp_rank * len(samples)
            source = len(self.sources) - 1
            found = rollout_rows(self._rollout, range(first, first + len(samples)))
            rows = [replace(row, source=source) for row in found]
        assert self.teacher is not None, "the teacher is read before training"
        self.teacher.see(micro_batches(rows, self._train.micro_batch_size, samples.start))
        return rows


class HeldoutDivergence:
    """Evaluator of the divergence from the teacher on held-out rows of each source."""

    def __init__(self, rows: Mapping[str, Sequence[Any]], loss: DistillLoss, teacher: Teacher) -> None:
        self._rows, self._loss, self._teacher = {name: found for name, found in rows.items() if found}, loss, teacher

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        """Returns, by source, the mean divergence, both models' losses at the loss's temperature, and the agreement."""
        found = {}
        for name, rows in self._rows.items():
            batches = batches_of_rank(rows, engine)
            self._teacher.see(batches)
            sums = engine.evaluate(batches, self._loss)
            found[f"{name} against the teacher"] = {"divergence": sums.mean_loss, **sums.metrics}
        return found
