"""Functions run in the ranks: what `DistributedOptimizer` sends in a training step, and when."""

from typing import Any
from unittest import mock

import torch

from pretrain.model.losses import NextToken
from pretrain.model.slices import is_expert, tp_split
from pretrain.parallel import distributed_optimizer, groups
from tests.parallel.workers.layouts import make_engine
from tests.parallel.workers.sharing import batches_of


def sent(model: dict[str, Any], parallel: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Elements of each collective of a step by kind, and the order of backward passes and reductions.

    `events` has "gradient" for each gradient that a backward pass brings and "reduce" for each reduction that begins.
    """
    events: list[str] = []
    elements: dict[str, list[int]] = {"reduce_scatter": [], "all_gather": []}
    reduce_scatter, all_gather = distributed_optimizer._reduce_scatter, distributed_optimizer._all_gather
    take = distributed_optimizer.DistributedOptimizer._take

    def reduce(output: torch.Tensor, whole: torch.Tensor, **options: Any) -> Any:
        events.append("reduce")
        elements["reduce_scatter"].append(whole.numel())
        assert whole.dtype == torch.float32
        return reduce_scatter(output, whole, **options)

    def gather(whole: torch.Tensor, part: torch.Tensor, **options: Any) -> Any:
        elements["all_gather"].append(whole.numel())
        assert whole.dtype == getattr(torch, dtype)
        return all_gather(whole, part, **options)

    def note(self: distributed_optimizer.DistributedOptimizer, parameter: torch.Tensor) -> None:
        events.append("gradient")
        take(self, parameter)

    with (
        mock.patch.object(distributed_optimizer, "BUCKET_SIZE", 4000),
        mock.patch.object(distributed_optimizer, "_reduce_scatter", reduce),
        mock.patch.object(distributed_optimizer, "_all_gather", gather),
        mock.patch.object(distributed_optimizer.DistributedOptimizer, "_take", note),
    ):
        engine = make_engine(model, parallel, dtype)
        batches = batches_of(engine)
        engine.train_step(batches, NextToken(), lr=1e-2)
        buckets = engine.zero.buckets
        result = {
            "events": events,
            **elements,
            "shared": [len(bucket.weights) for bucket in buckets if torch.distributed.get_world_size(bucket.group) > 1],
            "alone": [len(bucket.weights) for bucket in buckets if torch.distributed.get_world_size(bucket.group) == 1],
            "parameters": sum(p.numel() for p in engine.module.parameters()),
            "gradients": sum(1 for _ in engine.module.parameters()),
            "micro_batches": len(batches),
            "padding": 2 * distributed_optimizer.ALIGNMENT * len(buckets),
        }
    groups.stop()
    return result


def norms(model: dict[str, Any], parallel: dict[str, Any], dtype: str, steps: int) -> dict[str, Any]:
    """Gradient norms of `steps` clipped steps as this rank has them, and a checksum of each weight it holds whole."""
    engine = make_engine(model, parallel, dtype)
    found = [engine.train_step(batches_of(engine), NextToken(), lr=1e-2).grad_norm for _ in range(steps)]
    weights = {
        name: parameter.detach().double().sum().item()
        for name, parameter in engine.module.named_global_parameters()
        if tp_split(parameter) is None and not is_expert(parameter)
    }
    groups.stop()
    return {"norms": found, "weights": weights}
