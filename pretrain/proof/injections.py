"""Known bugs of parallel training, planted on purpose to show that `trivium prove` catches them.

Each is a context manager within which an engine is built and takes its steps. `trivium prove ... --inject NAME` plants
the bug in every layout, but not in the one rank that layouts are compared with.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import nn

from pretrain.model import Decoder, init_weights
from pretrain.model.batch import Batch
from pretrain.model.documents import Documents
from pretrain.model.losses import NextToken
from pretrain.model.moe import MoE
from pretrain.model.norm import RMSNorm
from pretrain.model.slices import is_expert
from pretrain.parallel import distributed_optimizer
from pretrain.parallel.context_parallel import own_parts
from pretrain.parallel.engine import Engine
from pretrain.parallel.gradients import mark_copies, sum_partial
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage
from pretrain.parallel.zero import gradient

ENGINE = "pretrain.parallel.engine"


def norm_gradients_not_summed() -> AbstractContextManager[Any]:
    """Under sequence parallel each rank keeps the gradient that its share of the sequence gives a norm weight."""

    def planted(stage: PipelineStage, mesh: Mesh) -> None:
        sum_partial(stage, replace(mesh, layout=replace(mesh.layout, sp=False)))

    return mock.patch(f"{ENGINE}.sum_partial", planted)


def partial_gradients_summed_twice() -> AbstractContextManager[Any]:
    """Gradients of the tied embedding's copies (and under sequence parallel of norms) are summed twice."""

    def planted(stage: PipelineStage, mesh: Mesh) -> None:
        sum_partial(stage, mesh)
        sum_partial(stage, mesh)

    return mock.patch(f"{ENGINE}.sum_partial", planted)


def replicated_weights_counted_tp_times() -> AbstractContextManager[Any]:
    """The grad norm counts norm weights, which every tensor-parallel rank holds whole, once for each rank."""

    right = distributed_optimizer.counts_in_norm

    def marked(stage: PipelineStage, mesh: Mesh) -> None:
        mark_copies(stage, mesh)
        for module in stage.modules():
            if isinstance(module, RMSNorm):
                vars(module.weight)["model_parallel"] = True  # DeepSpeed looks for this mark

    def counted(parameter: nn.Parameter, mesh: Mesh) -> bool:
        return right(parameter, mesh) or "model_parallel" in vars(parameter)

    stack = ExitStack()
    stack.enter_context(mock.patch(f"{ENGINE}.mark_copies", marked))
    stack.enter_context(mock.patch.object(distributed_optimizer, "counts_in_norm", counted))
    return stack


def mean_of_means() -> AbstractContextManager[Any]:
    """Each micro-batch's loss is a mean over its own tokens, however few they are."""
    right = NextToken.__call__

    def planted(self: NextToken, logprobs_BS: torch.Tensor, batch: Batch) -> Any:
        loss_BS, metrics = right(self, logprobs_BS, batch)
        return loss_BS * batch.loss_mask.numel() / 2 / batch.loss_mask.sum().clamp(min=1), metrics

    return mock.patch.object(NextToken, "__call__", planted)


def auxiliary_loss_times_micro_batches() -> AbstractContextManager[Any]:
    """The auxiliary loss is scaled by the number of micro-batches."""
    right = Engine._run

    def planted(self: Engine, batches: Any, *args: Any, **kwargs: Any) -> Any:
        for moe in self.module.moe_layers.values():
            denominators = moe.balance.denominators
            moe.balance.denominators = denominators and replace(denominators, scale=denominators.scale * len(batches))
        return right(self, batches, *args, **kwargs)

    return mock.patch.object(Engine, "_run", planted)


def chunks_initialised_alike() -> AbstractContextManager[Any]:
    """Every pipeline chunk counts its layers from 0, and so draws the first chunk's weights."""

    def planted(chunk: Decoder, *args: Any) -> None:
        first = min(chunk.blocks)

        def counted_from_zero() -> list[Any]:
            return [
                (name.replace(f"layers.{i}.", f"layers.{i - first}.") if f"layers.{i}." in name else name, parameter)
                for i in chunk.blocks
                for name, parameter in Decoder.named_global_parameters(chunk)
                if name.startswith(f"layers.{i}.") or (i == first and not name.startswith("layers."))
            ]

        with mock.patch.object(chunk, "named_global_parameters", counted_from_zero):
            init_weights(chunk, *args)

    return mock.patch(f"{ENGINE}.init_weights", planted)


def qk_norm_gradients_not_summed() -> AbstractContextManager[Any]:
    """Each tensor-parallel rank keeps the gradient that its own heads give a QK-norm weight."""
    return mock.patch("pretrain.parallel.gradients._partial_norms", lambda stage, mesh: [])


def router_gradients_not_summed() -> AbstractContextManager[Any]:
    """Each tensor-parallel rank gives the router the gradient that its share of the experts gives their weights."""

    def planted(self: MoE, x_TH: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.region.copy(x_TH), weights_TK

    return mock.patch.object(MoE, "_into_experts", planted)


def expert_gradients_doubled() -> AbstractContextManager[Any]:
    """Experts' gradients are averaged over the ranks that hold them, not over all whose tokens they have seen."""

    def planted(stage: PipelineStage, mesh: Mesh) -> None:
        sum_partial(stage, mesh)
        for parameter in stage.parameters():
            if is_expert(parameter):
                gradient(parameter).mul_(mesh.layout.ep)

    return mock.patch(f"{ENGINE}.sum_partial", planted)


def document_mask_off_by_one() -> AbstractContextManager[Any]:
    """Under context parallel the documents of whole rows begin one token late."""

    def planted(batches: Sequence[Batch], mesh: Mesh) -> list[Batch]:
        parts = own_parts(batches, mesh)
        if mesh.layout.cp == 1:
            return parts
        late = [Documents.of(batch.segments.roll(1, dims=1)) for batch in batches]
        return [replace(part, documents=documents) for part, documents in zip(parts, late, strict=True)]

    return mock.patch(f"{ENGINE}.own_parts", planted)


INJECTIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    planted.__name__: planted
    for planted in (
        norm_gradients_not_summed,
        partial_gradients_summed_twice,
        replicated_weights_counted_tp_times,
        mean_of_means,
        auxiliary_loss_times_micro_batches,
        chunks_initialised_alike,
        qk_norm_gradients_not_summed,
        router_gradients_not_summed,
        expert_gradients_doubled,
        document_mask_off_by_one,
    )
}
