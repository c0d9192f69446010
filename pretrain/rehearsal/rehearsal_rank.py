"""One rank of a rehearsal: the real engine takes one training step in this process, without other ranks.

The rank is alone, as `pretrain.parallel.lone_rank` says, and its tensors have no values, except for those that the
engine keeps in host memory. So model, pipeline schedule and optimizer run as they are, and do what they would do on a
GPU with NCCL, but for numbers that the engine asks the device for. Only experts make it ask, and `Balanced` answers.
"""

import contextlib
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.optim import optimizer as torch_optimizer

from configs.layout import Layout
from configs.model import ModelConfig
from configs.train import Precision, TrainerConfig
from data_pipeline.mixture.rows import Row
from pretrain.data.batch_source import collate
from pretrain.model import head_loss
from pretrain.model.losses import LossFunction, NextToken, SquaredValues
from pretrain.model.moe import dispatch, experts
from pretrain.parallel import collectives
from pretrain.parallel.distributed_optimizer import DistributedOptimizer
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh
from pretrain.parallel.lone_rank import alone
from pretrain.precision import choose_dtype
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


def rehearse(config: TrainerConfig, model: ModelConfig, layout: Layout, rank: int, on_cpu: bool) -> RehearsedRank:
    """Runs one training step of `rank` and returns what it did; `on_cpu` does what ranks do on CPUs over gloo."""
    calls: list[GroupCall] = []
    torch.set_num_threads(1)
    with alone(layout, rank) as mesh, stand_ins(mesh, model, on_cpu):
        try:
            engine = make_engine(config, model, mesh, on_cpu)
            with recorded(group_names(mesh)) as calls:
                take_step(engine, model)
        except Exception as error:
            return RehearsedRank(rank, mesh.pp_rank, calls, failure=_described(error))
        return RehearsedRank(rank, mesh.pp_rank, calls, *memory_of(engine))


def make_engine(config: TrainerConfig, model: ModelConfig, mesh: Mesh, on_cpu: bool) -> Engine:
    """Builds the engine that training would build, without compiling blocks, which changes no collective."""
    train = config.train.model_copy(update={"compile": False})
    if train.precision == Precision.AUTO and not on_cpu:
        dtype = torch.bfloat16
    else:
        dtype = choose_dtype(train.precision, torch.device("cpu"))
    return Engine(model, train, config.optimizer, mesh, config.run.seed, dtype, adapter=config.adapter)


def take_step(engine: Engine, model: ModelConfig) -> None:
    """Trains on rows that are one document each, every token of which is trained on."""
    train, layout = engine.train_config, engine.mesh.layout
    length = train.seq_length
    row = Row(
        tokens=np.zeros(length, np.int64),
        labels=np.zeros(length, np.int64),
        loss_mask=np.ones(length, np.bool_),
        positions=np.arange(length),
        segments=np.zeros(length, np.int64),
        source=0,
    )
    loss_fn: LossFunction = NextToken() if model.has_logits else SquaredValues()
    batch = collate([row] * train.micro_batch_size, 0)
    engine.train_step([batch] * layout.grad_accum_steps, loss_fn, 1e-3)


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


def memory_of(engine: Engine) -> tuple[int, dict[str, int]]:
    """Returns the number of this rank's parameters, and the bytes of weights, gradients and optimizer state."""
    parameters = list(engine.module.parameters())
    optimizer: DistributedOptimizer = engine.zero
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    buckets = optimizer.buckets
    moments = [value for state in optimizer.adam.state.values() for value in state.values() if torch.is_tensor(value)]
    masters = [bucket.master for bucket in buckets if bucket.master.dtype != bucket.weights.dtype]
    memory = {
        "weights": _bytes([*frozen, *(bucket.weights for bucket in buckets)]),
        "gradients": _bytes([bucket.gradients for bucket in buckets]),
        "optimizer": _bytes([*moments, *masters]),
    }
    return sum(parameter.numel() for parameter in parameters), memory


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
