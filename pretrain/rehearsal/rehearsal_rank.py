"""One rank of a rehearsal: the real engine takes one training step in this process, without other ranks.

The rank is alone, as `pretrain.parallel.lone_rank` says, and its tensors have no values, except for those that the
engine keeps in host memory. So model, pipeline schedule and optimizer run as they are, and do what they would do on a
GPU with NCCL, but for numbers that the engine asks the device for. Only experts make it ask, and `Balanced` answers.
"""

import contextlib
import math
import pkgutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import optimizer as torch_optimizer

from configs.layout import Layout
from configs.model import ModelConfig
from configs.train import Precision, TrainerConfig, TrainSection
from data_pipeline.mixture.rows import Row
from pretrain.data.batch_source import collate
from pretrain.model import head_loss
from pretrain.model.adapters.quantized_base import quantized_weights
from pretrain.model.batch import Batch
from pretrain.model.losses import LossFunction, NextToken, SquaredValues
from pretrain.model.moe import dispatch, experts
from pretrain.parallel import collectives, zero
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh
from pretrain.parallel.lone_rank import alone
from pretrain.precision import choose_dtype
from pretrain.rehearsal.budget_on_meta import choosing_ranks, stand_ins_of_budget
from pretrain.rehearsal.collective_calls import GroupCall, recorded


@dataclass(frozen=True)
class RehearsedRank:
    """The calls of a rank in one step, and the memory in bytes that its model and optimizer need.

    `failure` is empty if the step came to its end.
    """

    rank: int
    stage: int
    calls: list[GroupCall]
    parameters: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    failure: str = ""


class MakeEngine(Protocol):
    """A maker of an engine as training would make it; with the section `frozen` it only evaluates, without adapters."""

    def __call__(self, model: ModelConfig, mesh: Mesh, frozen: TrainSection | None = None) -> Engine: ...


@dataclass(frozen=True)
class PreparedStep:
    """A training step on this rank: its engines, of which the first takes the micro-batches, and the step itself."""

    engines: list[Engine]
    take: Callable[[], Any]


# Makes the step of a config on a rank.
PrepareStep = Callable[[Any, ModelConfig, Mesh, MakeEngine], PreparedStep]


def rehearse(
    config: TrainerConfig,
    model: ModelConfig,
    layout: Layout,
    rank: int,
    on_cpu: bool,
    missing: int = 0,
    prepare: str = "",
) -> RehearsedRank:
    """Runs one training step of `rank` and returns what it did; `on_cpu` does what ranks do on CPUs over gloo.

    The step is that of pretraining, or the one that the function with the name `prepare` makes. The calls of `missing`
    micro-batches, which are not run, are those of the last but one.
    """
    calls: list[GroupCall] = []
    torch.set_num_threads(1)
    config = choosing_ranks(config)
    with alone(layout, rank) as mesh, stand_ins(mesh, model, on_cpu), stand_ins_of_budget(config):
        try:
            step_of: PrepareStep = pkgutil.resolve_name(prepare) if prepare else pretraining_step
            step = step_of(config, model, mesh, maker(config, on_cpu))
            begun = _forward_passes(step.engines[0], calls)
            with recorded(group_names(mesh), calls):
                step.take()
        except Exception as error:
            return RehearsedRank(rank, mesh.pp_rank, calls, failure=_described(error))
        if missing:
            calls[begun[-1] : begun[-1]] = missing * calls[begun[-2] : begun[-1]]
        return RehearsedRank(rank, mesh.pp_rank, calls, *memory_of(step.engines))


def maker(config: TrainerConfig, on_cpu: bool) -> MakeEngine:
    """Returns a maker of engines that does not compile blocks, which changes no collective."""
    if config.train.precision == Precision.AUTO and not on_cpu:
        dtype = torch.bfloat16
    else:
        dtype = choose_dtype(config.train.precision, torch.device("cpu"))

    def make(model: ModelConfig, mesh: Mesh, frozen: TrainSection | None = None) -> Engine:
        train = (frozen or config.train).model_copy(update={"compile": False})
        trained = (None, None) if frozen else (config.optimizer, config.adapter)
        return Engine(model, train, trained[0], mesh, config.run.seed, dtype, adapter=trained[1])

    return make


def pretraining_step(config: TrainerConfig, model: ModelConfig, mesh: Mesh, make: MakeEngine) -> PreparedStep:
    """Prepares a step on rows that are one document each, every token of which is trained on."""
    engine = make(model, mesh)
    loss: LossFunction = NextToken() if model.has_logits else SquaredValues()
    batches = stand_in_batches(engine, stand_in_row(config.train.seq_length))
    return PreparedStep([engine], lambda: engine.train_step(batches, loss, 1e-3))


def stand_in_row(length: int) -> Row:
    """Returns a row of one document of `length` tokens, all of them trained on."""
    return Row(
        tokens=np.zeros(length, np.int64),
        labels=np.zeros(length, np.int64),
        loss_mask=np.ones(length, np.bool_),
        positions=np.arange(length),
        segments=np.zeros(length, np.int64),
        source=0,
    )


def stand_in_batches(engine: Engine, row: Row) -> list[Batch]:
    """Returns the micro-batches of a step, all of them the same rows."""
    batch = collate([row] * engine.train_config.micro_batch_size, 0)
    return [batch] * engine.mesh.layout.grad_accum_steps


def _forward_passes(engine: Engine, calls: list[GroupCall]) -> list[int]:
    """Returns a list that gets, at each forward pass that the engine begins, the number of `calls` before it."""
    begun: list[int] = []
    forward = engine._forward_step

    def noted(*args: Any, **options: Any) -> Any:
        begun.append(len(calls))
        return forward(*args, **options)

    vars(engine)["_forward_step"] = noted
    return begun


def group_names(mesh: Mesh) -> dict[int, str]:
    """Returns the names of the groups of a layout by their identity."""
    data = "dp" if mesh.layout.cp == 1 else "dp x cp"
    named = {
        data: mesh.zero_group,
        "expert-dp": mesh.expert_dp_group,
        "tp": mesh.tp_group,
        "cp": mesh.cp_group,
        "ep": mesh.ep_group,
        "pp": mesh.pp_group,
        "key-value head": mesh.kv_group,
        "world": dist.group.WORLD,
    }
    return {id(group): name for name, group in named.items() if group is not None}


@contextlib.contextmanager
def stand_ins(mesh: Mesh, model: ModelConfig, on_cpu: bool) -> Iterator[None]:
    """Context manager in which the engine runs on the meta device, as on a GPU or else as on a CPU."""
    balanced = Balanced(mesh, model)
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        put(dispatch, "exchanged_rows", balanced.exchanged_rows)
        put(experts, "on_host", balanced.on_host)
        # AdamW looks for the device of its weights in this list.
        put(torch_optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta", "cpu"])
        if on_cpu:
            put(collectives, "sends_parts", lambda flat: True)
            put(head_loss, "CHUNK_GPU", head_loss.CHUNK_CPU)
        yield


class Balanced:
    """Numbers that the engine asks the device for, as if routers spread rows evenly over experts and their ranks."""

    def __init__(self, mesh: Mesh, model: ModelConfig):
        self._ranks, self._own, self._moe = mesh.layout.ep, mesh.ep_rank, model.moe

    def exchanged_rows(
        self, sent: torch.Tensor, received: torch.Tensor, rows: torch.Tensor
    ) -> tuple[list[int], list[int]]:
        """Stands in for `dispatch.exchanged_rows`."""
        count, moe = len(rows), self._moe
        if moe is not None and moe.capacity_factor is not None:
            count = min(count, moe.num_experts * math.ceil(moe.capacity_factor * count / moe.num_experts))
        shares = _shares(count, self._ranks)
        return shares, [shares[self._own]] * self._ranks

    def on_host(self, counts: torch.Tensor, x_RH: torch.Tensor) -> torch.Tensor:
        """Stands in for `experts.on_host`."""
        return torch.tensor(_shares(len(x_RH), len(counts)))


def _shares(rows: int, parts: int) -> list[int]:
    """Divides a number of rows into parts as equal as can be."""
    return [rows * (part + 1) // parts - rows * part // parts for part in range(parts)]


def memory_of(engines: Sequence[Engine]) -> tuple[int, dict[str, int]]:
    """Returns the number of this rank's parameters, and the bytes of weights, gradients and optimizer state."""
    count, memory = 0, dict.fromkeys(("weights", "gradients", "optimizer"), 0)
    for engine in engines:
        parameters = [zero.outline(parameter) for parameter in engine.module.parameters()]
        count += sum(one.numel() for one in parameters)
        memory["weights"] += sum(one.numel() * one.element_size() for one in parameters if not one.requires_grad)
        for _, quantized in quantized_weights(engine.module):
            count += quantized.outline.numel()
            memory["weights"] += quantized.memory_bytes
        for name, size in (zero.memory_of(engine.zero) if engine.zero is not None else {}).items():
            memory[name] += size
    return count, memory


def _described(error: Exception) -> str:
    """Returns an error in one line, with the innermost line of the project that it went through."""
    project = Path(__file__).parents[2]
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(project) and ".venv" not in frame.filename
    ]
    location = f" at {Path(own[-1].filename).relative_to(project)}:{own[-1].lineno} in {own[-1].name}" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}{location}"
