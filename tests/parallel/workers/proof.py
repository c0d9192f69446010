"""Functions run in the ranks: the steps of a proof or of training, with a planted bug or with records of tensors."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.layout import Layout
from configs.loader import validate
from configs.train import PretrainConfig
from launch.environment import ClusterEnvironment
from pretrain.data.batch_source import micro_batches, share_of_rank
from pretrain.model.losses import NextToken
from pretrain.parallel import groups
from pretrain.parallel.engine import Engine, StepSums
from pretrain.proof import recorded_step
from pretrain.proof.device_rank import prove_device
from pretrain.proof.exact_facts import differing_copies
from pretrain.proof.injections import INJECTIONS
from pretrain.proof.recorded_step import SOURCES, packed_rows, prove_step
from tests.parallel.forks import REPOSITORY


def prove(config: dict[str, Any], precision: str, inject: str | None = None, reference: str | None = None) -> None:
    """Takes the steps of a proof, but two instead of three: the second shows what the first has left."""
    checked = validate(PretrainConfig, config)
    env = ClusterEnvironment.read()
    mesh = groups.start(env, Layout.of(env.world_size, checked.parallel, checked.model, checked.train))
    with mock.patch.object(recorded_step, "STEPS", 2):
        prove_step(checked, mesh, precision, inject, None if reference is None else Path(reference))
    groups.stop()


def prove_on_device(
    config: dict[str, Any], precision: str, start: str, inject: str | None = None, reference: str | None = None
) -> None:
    checked = validate(PretrainConfig, config)
    env = ClusterEnvironment.read()
    planted = _doubled_later() if inject == "learning_rate_doubled_later" else nullcontext()
    with groups.joined(env, Layout.of(env.world_size, checked.parallel, checked.model, checked.train)) as mesh, planted:
        known = inject if inject in INJECTIONS else None
        prove_device(checked, mesh, precision, known, None if reference is None else Path(reference), Path(start))


@contextmanager
def _doubled_later() -> Iterator[None]:
    """Doubles the learning rate of all steps but the first."""
    right, calls = Engine.update, itertools.count()

    def update(engine: Engine, lr: float) -> StepSums:
        return right(engine, lr * 2 if next(calls) else lr)

    with mock.patch.object(Engine, "update", update):
        yield


def train(config: dict[str, Any], steps: int, inject: str | None = None) -> dict[str, Any]:
    """Trains in bf16; returns the gradient norm of each step, and the weights of which copies differ at the end."""
    checked = validate(PretrainConfig, config)
    env = ClusterEnvironment.read()
    mesh = groups.start(env, Layout.of(env.world_size, checked.parallel, checked.model, checked.train))
    batch, micro, norms = checked.train.global_batch_size, checked.train.micro_batch_size, []
    with INJECTIONS[inject]() if inject else nullcontext():
        engine = Engine(checked.model, checked.train, checked.optimizer, mesh, 7, torch.bfloat16, SOURCES)
        for step in range(steps):
            share = share_of_rank(step * batch, batch, mesh.dp_rank, mesh.layout.dp)
            rows = packed_rows(share.start, len(share), checked.model.vocab_size, checked.train.seq_length)
            sums = engine.train_step(micro_batches(rows, micro, share.start), NextToken(), checked.optimizer.lr)
            norms.append(sums.grad_norm)
    differing = differing_copies(engine)
    groups.stop()
    return {"norms": norms, "differing": differing}


def functions_in_fp32(config: dict[str, Any]) -> list[str]:
    """Returns the functions of pretrain, as file:function, in which a step in fp64 makes fp32 tensors, without scalars.

    A tensor that a library makes counts for the function that calls the library.
    """
    with Fp32Tensors() as seen:
        prove(config, "fp64")
    return sorted(seen.functions)


class Fp32Tensors(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = (t for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        if any(t.dtype == torch.float32 and t.numel() > 1 for t in made):
            self.functions.add(_nearest_function())
        return result


def _nearest_function() -> str:
    frame = sys._getframe(2)
    while frame.f_back and not frame.f_code.co_filename.startswith(str(REPOSITORY / "pretrain")):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
