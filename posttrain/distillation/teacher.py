"""The teacher of a distillation run: a frozen model in the layout of the student, which predicts on the same batches.

Of each micro-batch it keeps the final hidden states at the trained tokens, on the last pipeline stage: tokens times
hidden size, never times vocabulary. It has weights and nothing else: no gradients, no optimizer state.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from configs.distill import DistillConfig, TeacherConfig
from configs.initial import MODELS
from configs.layout import Layout
from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.train import ParallelConfig, TrainSection
from data_pipeline.tokens.tokenizer import difference
from posttrain.distillation.divergence_head import Head, TeacherStates
from pretrain.checkpoint import storage
from pretrain.checkpoint.adapter_base import content_of
from pretrain.checkpoint.lineage import Pin
from pretrain.checkpoint.state import fill_evaluated
from pretrain.model.batch import Batch
from pretrain.model.head_loss import HeadLoss
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh
from pretrain.precision import choose_dtype
from pretrain.run.initial_model import InitialModel, initial_weights

BY_SEQUENCES = (
    "distil by sequences instead: let the teacher write dialogues by `trivium sample`, and train the student on them "
    "by `trivium sft`"
)


@dataclass(frozen=True)
class OpenedTeacher:
    """A teacher that fits the student, with its layout, before its weights are read."""

    initial: InitialModel
    layout: Layout

    @property
    def pin(self) -> Pin:
        """The checkpoint, or Hugging Face folder, that the teacher is."""
        return self.initial.pin

    def mesh_beside(self, mesh: Mesh) -> Mesh:
        """Returns the mesh of the teacher on the ranks of the student's."""
        return replace(mesh, layout=self.layout, kv_group=None)  # which only gradients need


def open_teacher(config: DistillConfig, student: InitialModel, world_size: int) -> OpenedTeacher:
    """Opens the teacher without reading its weights.

    Raises ConfigError if there is none, if it writes no text, if its tokenizer is not the student's, or if it does not
    fit the layout.
    """
    said = config.teacher.said
    try:
        named, note = _kept(config.teacher, student)
        found = InitialModel.open(named, f"{config.run.dir}/teacher", "no")
        found = replace(found, note=note or found.note)
        found.check_writes_text()
        if found.tokenizer is None:
            raise ConfigError(
                f"{said}: nothing says which tokenizer the teacher was trained with; set init.tokenizer to its folder"
            )
    except ConfigError as error:
        words = re.sub(r"\binit\.(run|checkpoint|hf|tokenizer)\b", r"teacher.\1", str(error))
        raise ConfigError(words) from None
    found = replace(found, model=found.model.without_mtp())  # of which nothing is compared
    assert student.tokenizer is not None and found.tokenizer is not None
    if what := difference(found.tokenizer, student.tokenizer):
        raise ConfigError(
            f"{said} has the tokenizer {found.tokenizer.origin}, and the student of {student.said} has "
            f"{student.tokenizer.origin}: {what}, so their tokens cannot be compared; {BY_SEQUENCES}"
        )
    if config.parallel.tp > 1 and found.model.vocab_size != student.model.vocab_size:
        raise ConfigError(
            f"{said} has a vocabulary of {found.model.vocab_size} tokens with its padding, and the student one of "
            f"{student.model.vocab_size}, which parallel.tp = {config.parallel.tp} would split at different tokens; "
            "set parallel.tp=1"
        )
    try:
        return OpenedTeacher(found, layout_of(found.model, config.parallel, config.train, world_size))
    except ConfigError as error:
        raise ConfigError(f"{said} does not fit the layout: {error}") from None


def _kept(named: TeacherConfig, student: InitialModel) -> tuple[TeacherConfig, str | None]:
    """Returns the teacher to open, and a note if it is not the newest: a run that goes on keeps the one it began with.

    Raises ConfigError if that is not there any more, and `named` still means it.
    """
    manifest = storage.read_manifest(student.own) if student.own else {}
    if not (begun := manifest.get("source", {}).get("teacher")):
        return named, None
    checkpoint, before = Path(begun["checkpoint"]), manifest["config"].get("teacher", {})
    now = Path(named.run or named.checkpoint or named.hf or "")
    is_same = str(now) in {before.get(key) for key in MODELS}
    for path in (*([checkpoint] if is_same else []), now, now / "checkpoints" / checkpoint.name):
        if content_of(path) == begun["sha256"]:
            break
    else:
        if is_same:
            raise ConfigError(
                f"{named.said} was {checkpoint} when the run began, and that is gone or was replaced; restore it, or "
                "choose another run.dir"
            )
        return named, None
    key = "checkpoint" if (path / storage.MANIFEST).is_file() else "hf"
    note = None
    if named.run and any(storage.directory(now, step).name != path.name for step in storage.steps(now)[-1:]):
        note = f"the run began with the teacher {path} and keeps it; newer checkpoints of {now} are ignored"
    return named.model_copy(update={**dict.fromkeys(MODELS), key: str(path)}), note


def layout_of(model: ModelConfig, parallel: ParallelConfig, train: TrainSection, world_size: int) -> Layout:
    """Returns the layout of a teacher beside a student with these sections. Raises ConfigError if there is none."""
    own: dict[str, Any] = {"zero": 1, "offload_optimizer": False, "vpp": 1, "layers_per_stage": None}
    own["ep"] = parallel.ep if model.moe else 1
    given = ("train.global_batch_size", "train.micro_batch_size", "train.seq_length")
    return Layout.of(world_size, parallel.model_copy(update=own), model, train, given=given)


def check_length(config: DistillConfig, teacher: OpenedTeacher, longest: int, what: str, remedy: str) -> None:
    """Raises ConfigError if texts of `longest` tokens, which `what` has, are longer than any the teacher has seen."""
    context = teacher.initial.lineage.context
    if context and longest > context:
        raise ConfigError(
            f"{what} have up to {longest} tokens, and {config.teacher.said} was trained on {context} at a time, beyond "
            f"which it predicts badly; {remedy.format(context=context)}, or choose another teacher"
        )


def check_template(config: DistillConfig, teacher: OpenedTeacher, template: str) -> None:
    """Raises ConfigError if the teacher was trained on dialogues written otherwise than by `template`."""
    own, run = teacher.initial.lineage.chat_template, teacher.pin.run
    if own is None or own == template:
        return
    file = run / "chat_template.jinja"
    remedy = f"set data.chat_template={file}" if file.is_file() else "name the teacher's template in data.chat_template"
    raise ConfigError(
        f"{config.teacher.said} was trained on dialogues written by another chat template than the student's, and "
        f"would judge text that it has never seen; {remedy}, or choose another teacher"
    )


def frozen(train: TrainSection) -> TrainSection:
    """Returns the student's section as a teacher needs it, which only evaluates."""
    return train.model_copy(update={"freeze": (), "dropout": 0.0, "recompute": "none"})


class Teacher:
    """The frozen model on this rank, with its weights. All ranks make one and call `see` together."""

    def __init__(self, opened: OpenedTeacher, engine: Engine) -> None:
        """Takes a teacher's frozen `engine`; `read` also builds it."""
        self.vocab_size, self.checkpoint = opened.initial.model.vocab_size, opened.pin.checkpoint
        self.engine = engine
        self._states: dict[tuple[int, ...], TeacherStates] = {}

    @classmethod
    def read(cls, opened: OpenedTeacher, train: TrainSection, mesh: Mesh) -> "Teacher":
        """Builds the model and reads its weights; `train` is the student's section, `mesh` its mesh."""
        train, mesh = frozen(train), opened.mesh_beside(mesh)
        dtype = choose_dtype(train.precision, mesh.device)
        with initial_weights(opened.pin) as tensors:
            engine = Engine(opened.initial.model, train, None, mesh, 0, dtype, adapter=tensors.adapter)
            fill_evaluated(engine, tensors)
        return cls(opened, engine)

    def see(self, batches: Sequence[Batch]) -> None:
        """Computes the teacher's hidden states on micro-batches, and forgets those on earlier ones."""
        kept = _KeptStates()
        self._states = {}  # frees the memory of earlier ones first
        self.engine.evaluate(batches, kept)
        self._states = kept.found

    def states(self, batch: Batch) -> TeacherStates:
        """Returns the teacher's hidden states on a micro-batch that it saw, found by the numbers of its samples."""
        assert batch.samples is not None
        states = self._states[batch.samples]
        # Copies of a batch that only fill up a pipeline have nothing to train.
        return states if len(batch.trained) else replace(states, x=states.x[:0])


class _KeptStates:
    """A loss function that keeps the final hidden states, by the samples of the batch."""

    metrics: tuple[str, ...] = ()
    temperature = 1.0
    is_linear = True

    def __init__(self) -> None:
        self.found: dict[tuple[int, ...], TeacherStates] = {}

    def head_loss(self, batch: Batch, scale: float, num_sources: int) -> HeadLoss:
        """Returns a loss for the output head that keeps hidden states in place of computing anything."""
        return _KeptHead(batch, self, scale, num_sources)

    def __call__(self, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns zeros of the teacher's outputs, since the teacher is run for its hidden states and not for a loss."""
        return torch.zeros_like(outputs), {}


class _KeptHead(HeadLoss):
    """A loss of the output head that keeps the hidden states it gets, in place of computing anything."""

    loss_fn: _KeptStates

    def __call__(
        self,
        x_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        vocab_size: int,
        group: ProcessGroup | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Keeps the hidden states at `batch.trained`, and returns a loss of 0."""
        assert self.batch.samples is not None
        states = TeacherStates(x_NH.detach(), Head(weight_VH.detach(), softcap))
        self.loss_fn.found.setdefault(self.batch.samples, states)
        self.sums = torch.zeros(2 * self.num_sources, dtype=torch.float64, device=x_NH.device)
        return x_NH.new_zeros(())
