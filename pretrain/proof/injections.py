"""Known bugs of parallel training, planted on purpose to show that `trivium prove` catches them.

Each is a context manager within which an engine is built and takes its steps. `trivium prove ... --inject NAME` plants
the bug in every layout, but not in the one rank that layouts are compared with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pretrain.model import Decoder, init_weights
from pretrain.model.batch import Batch
from pretrain.model.documents import Documents, attend_rows
from pretrain.model.layers import RMSNorm
from pretrain.model.losses import NextToken
from pretrain.model.moe import MoE
from pretrain.model.moe.balance import Balance
from pretrain.model.slices import Slices, is_expert, marks_of, tp_split
from pretrain.model.tensor_parallel import RowLinear
from pretrain.parallel import distributed_optimizer, expert_balance
from pretrain.parallel.context_parallel import own_parts
from pretrain.parallel.distributed_optimizer import DistributedOptimizer
from pretrain.parallel.engine import Engine
from pretrain.parallel.expert_parallel import spread_experts
from pretrain.parallel.gradients import mark_copies, sum_partial
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage
from pretrain.parallel.zero import gradient

ENGINE = "pretrain.parallel.engine"


def norm_gradients_not_summed() -> AbstractContextManager[Any]:
    """Plants a bug: under sequence parallel each rank keeps its own share of the gradient of a norm weight."""

    def planted(stage: PipelineStage, mesh: Mesh) -> None:
        sum_partial(stage, replace(mesh, layout=replace(mesh.layout, sp=False)))

    return mock.patch(f"{ENGINE}.sum_partial", planted)


def partial_gradients_summed_twice() -> AbstractContextManager[Any]:
    """Plants a bug: gradients of a tied embedding's copies (with sp of norms, too) are summed twice."""

    def planted(stage: PipelineStage, mesh: Mesh) -> None:
        sum_partial(stage, mesh)
        sum_partial(stage, mesh)

    return mock.patch(f"{ENGINE}.sum_partial", planted)


def replicated_weights_counted_tp_times() -> AbstractContextManager[Any]:
    """Plants a bug: the grad norm counts norm weights, which every tp rank holds whole, once for each rank."""

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
    """Plants a bug: each micro-batch's loss is a mean over its own tokens, however few they are."""
    right = NextToken.__call__

    def planted(self: NextToken, logprobs_BS: torch.Tensor, batch: Batch) -> Any:
        loss_BS, metrics = right(self, logprobs_BS, batch)
        return loss_BS * batch.loss_mask.numel() / 2 / batch.loss_mask.sum().clamp(min=1), metrics

    return mock.patch.object(NextToken, "__call__", planted)


def auxiliary_loss_times_micro_batches() -> AbstractContextManager[Any]:
    """Plants a bug: the auxiliary loss is scaled by the number of micro-batches."""
    right = Engine._run

    def planted(self: Engine, batches: Any, *args: Any, **kwargs: Any) -> Any:
        for moe in self.module.moe_layers.values():
            denominators = moe.balance.denominators
            moe.balance.denominators = denominators and replace(denominators, scale=denominators.scale * len(batches))
        return right(self, batches, *args, **kwargs)

    return mock.patch.object(Engine, "_run", planted)


def chunks_initialised_alike() -> AbstractContextManager[Any]:
    """Plants a bug: every pipeline chunk counts its layers from 0, and so draws the first chunk's weights."""

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
    """Plants a bug: each tensor-parallel rank keeps the gradient that its own heads give a QK-norm weight."""
    return mock.patch("pretrain.parallel.gradients.marks_of", lambda p: replace(marks_of(p), partial="never"))


def key_value_gradients_not_summed() -> AbstractContextManager[Any]:
    """Plants a bug: of tp ranks with one key-value head, each keeps its own query heads' gradient of it."""

    def planted(stage: PipelineStage, mesh: Mesh) -> None:
        sum_partial(stage, replace(mesh, kv_group=None))

    return mock.patch(f"{ENGINE}.sum_partial", planted)


def router_gradients_not_summed() -> AbstractContextManager[Any]:
    """Plants a bug: each tensor-parallel rank gives the router the gradient of its share of the experts alone."""

    def planted(self: MoE, x_TH: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.region.copy(x_TH), weights_TK

    return mock.patch.object(MoE, "_into_experts", planted)


def expert_gradients_doubled() -> AbstractContextManager[Any]:
    """Plants a bug: experts' gradients are averaged over their holders, so doubled at ep=2 (pytorch issue 160285)."""

    def planted(stage: PipelineStage, mesh: Mesh) -> None:
        sum_partial(stage, mesh)
        for parameter in stage.parameters():
            if is_expert(parameter):
                gradient(parameter).mul_(mesh.layout.ep)

    return mock.patch(f"{ENGINE}.sum_partial", planted)


def document_mask_off_by_one() -> AbstractContextManager[Any]:
    """Plants a bug: under context parallel the documents of whole rows begin one token late."""

    def planted(batches: Sequence[Batch], mesh: Mesh) -> list[Batch]:
        parts = own_parts(batches, mesh)
        if mesh.layout.cp == 1:
            return parts
        late = [Documents.of(batch.segments.roll(1, dims=1)) for batch in batches]
        return [replace(part, documents=documents) for part, documents in zip(parts, late, strict=True)]

    return mock.patch(f"{ENGINE}.own_parts", planted)


def expert_norm_not_summed_over_tp() -> AbstractContextManager[Any]:
    """Plants a bug: each tp rank adds its part of experts' gradients to the norm, as DeepSpeed's bf16 optimizer did."""

    def planted(self: DistributedOptimizer) -> torch.Tensor:
        mesh = self._mesh
        squares = torch.zeros(1 + mesh.layout.tp, dtype=torch.float64, device=mesh.device)  # others; experts by tp rank
        for bucket in self.buckets:
            kind = 1 + mesh.tp_rank if is_expert(bucket.parameters[0]) else 0
            for first, end in bucket.counted:
                squares[kind] += bucket.own_gradients[first:end].double().square().sum()
        dist.all_reduce(squares)
        return (squares[0] + squares[1 + mesh.tp_rank]).sqrt()

    return mock.patch.object(DistributedOptimizer, "_norm", planted)


def experts_missing_from_norm() -> AbstractContextManager[Any]:
    """Plants a bug: the grad norm leaves out the experts' gradients (Megatron-LM issue 5916, at ep x tp)."""

    def planted(stage: PipelineStage, mesh: Mesh) -> None:
        mark_copies(stage, mesh)
        for parameter in stage.parameters():
            if is_expert(parameter):
                vars(parameter)["ds_pipe_replicated"] = True  # the mark of weights to leave out

    return mock.patch(f"{ENGINE}.mark_copies", planted)


def clip_factor_for_each_group() -> AbstractContextManager[Any]:
    """Plants a bug: each group of parameters is clipped by its own norm, not that of all (Automodel issue 3816)."""
    right = DistributedOptimizer.step

    def planted(self: DistributedOptimizer, lr: float, *rest: float) -> torch.Tensor:
        norm = self._norm()
        for bucket in self.buckets:
            own = bucket.own_gradients.square().sum()
            dist.all_reduce(own, group=bucket.group)
            bucket.own_gradients.mul_(norm / own.sqrt())
        with mock.patch.object(self, "_norm", lambda: norm):
            return right(self, lr, *rest)

    return mock.patch.object(DistributedOptimizer, "step", planted)


def router_counts_not_summed_over_tp() -> AbstractContextManager[Any]:
    """Plants a bug: each tp rank counts its share of the tokens alone for the router's bias (torchtitan issue 4154)."""

    def planted(stage: PipelineStage, mesh: Mesh) -> None:
        spread_experts(stage, mesh)
        for moe in stage.moe_layers.values():
            vars(moe.balance)["attach"] = partial(_attach_part, moe.balance.attach, moe.balance, mesh)

    return mock.patch(f"{ENGINE}.spread_experts", planted)


def _attach_part(
    attach: Callable[..., torch.Tensor],
    balance: Balance,
    mesh: Mesh,
    x_TH: torch.Tensor,
    logits_TE: torch.Tensor,
    experts_TK: torch.Tensor,
    valid_SB: torch.Tensor,
) -> torch.Tensor:
    """Calls `attach`, and takes back the counts of tokens that are not in this tensor-parallel rank's share."""
    own_S = torch.arange(len(valid_SB)) * mesh.layout.tp // len(valid_SB) == mesh.tp_rank
    others = experts_TK.unflatten(0, (len(valid_SB), -1))[valid_SB & ~own_S[:, None].to(valid_SB.device)]
    before = balance.tokens.clone()
    result = attach(x_TH, logits_TE, experts_TK, valid_SB)
    if not torch.equal(before, balance.tokens):  # the backward pass, which computes it again, does not count
        balance.tokens -= torch.bincount(others.flatten(), minlength=len(before))
    return result


def router_counts_not_summed_over_replicas() -> AbstractContextManager[Any]:
    """Plants a bug: each data-parallel rank moves its router's bias by the tokens that it has seen itself."""

    def planted(stage: PipelineStage, mesh: Mesh, changes: torch.Tensor) -> None:
        for moe in stage.moe_layers.values():
            moe.balance.finish(moe.balance.tokens, changes)

    return mock.patch.object(expert_balance, "finish_step", planted)


def router_bias_multiplied_by_tp() -> AbstractContextManager[Any]:
    """Plants a bug: the router's bias, which tensor-parallel ranks replicate, is summed over them after each step."""
    right = expert_balance.finish_step

    def planted(stage: PipelineStage, mesh: Mesh, changes: torch.Tensor) -> None:
        right(stage, mesh, changes)
        for moe in stage.moe_layers.values():
            dist.all_reduce(moe.balance.bias, group=mesh.tp_group)

    return mock.patch.object(expert_balance, "finish_step", planted)


def replicated_bias_multiplied_by_tp() -> AbstractContextManager[Any]:
    """Plants a bug: each rank adds a row layer's bias before outputs are summed over tp, as in torchtitan 4245."""
    right = RowLinear.forward

    def planted(self: RowLinear, x: torch.Tensor) -> torch.Tensor:
        y = right(self, x)
        copies = self.input_size // self.input_size_per_partition
        return y if self.bias is None else y + (copies - 1) * self.bias.detach()  # the gradient is right

    return mock.patch.object(RowLinear, "forward", planted)


def uneven_vocabulary_cut_without_padding() -> AbstractContextManager[Any]:
    """Plants a bug: a vocabulary that tp does not divide is loaded in slices of V // tp rows (torchtitan 1136)."""

    def planted(chunk: Decoder, seed: int, slices: Slices, *args: Any) -> None:
        init_weights(chunk, seed, SlicesWithoutPadding(**vars(slices)), *args)

    return mock.patch(f"{ENGINE}.init_weights", planted)


class SlicesWithoutPadding(Slices):
    """Slices of which each begins where the ones before it would end if none of them were longer than V // tp."""

    def offset(self, parameter: nn.Parameter) -> tuple[int, ...]:
        split, offset = tp_split(parameter), list(super().offset(parameter))
        if split is not None and split.size % (self.tp // split.copies):
            offset[split.dim] = self.tp_rank // split.copies * (split.size * split.copies // self.tp)
        return tuple(offset)


@contextmanager
def evaluation_moves_router_bias() -> Iterator[None]:
    """Plants a bug: tokens of an evaluation are counted, and so move the router's bias (torchtitan issue 4148)."""
    begin, finish = expert_balance.begin_step, expert_balance.finish_step

    def spread(stage: PipelineStage, mesh: Mesh) -> None:
        spread_experts(stage, mesh)
        for moe in stage.moe_layers.values():
            moe.router.register_forward_hook(partial(_count_in_evaluation, moe))

    def begun(stage: PipelineStage, *args: Any) -> None:
        counts = [moe.balance.tokens.clone() for moe in stage.moe_layers.values()]
        begin(stage, *args)
        for moe, count in zip(stage.moe_layers.values(), counts, strict=True):
            moe.balance.tokens += count

    def finished(stage: PipelineStage, mesh: Mesh, changes: torch.Tensor) -> None:
        finish(stage, mesh, changes)
        for moe in stage.moe_layers.values():
            moe.balance.start()

    with (
        mock.patch(f"{ENGINE}.spread_experts", spread),
        mock.patch.object(expert_balance, "begin_step", begun),
        mock.patch.object(expert_balance, "finish_step", finished),
    ):
        yield


def _count_in_evaluation(moe: MoE, router: torch.nn.Module, _: Any, output: Any) -> None:
    if not router.training:
        moe.balance.tokens += torch.bincount(output[1].flatten(), minlength=len(moe.balance.tokens))


def products_in_tf32() -> AbstractContextManager[Any]:
    """Plants a bug: products of fp32 matrices keep 10 of 23 bits of inputs, as a GPU's TF32 (for --against)."""
    right = F.linear

    def rounded(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32:
            return x
        kept = ((x.detach().contiguous().view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)
        return x + (kept.view_as(x) - x.detach())  # the gradient passes

    def planted(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        return right(rounded(x), rounded(weight), *rest)

    return mock.patch.object(F, "linear", planted)


def attention_across_documents() -> AbstractContextManager[Any]:
    """Plants a bug: attention takes each row for one document, as if told wrong boundaries (for --against)."""

    def planted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Documents) -> torch.Tensor:
        return attend_rows(q, k, v, None)

    return mock.patch("pretrain.model.attention_scores.attend_documents", planted)


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
        key_value_gradients_not_summed,
        router_gradients_not_summed,
        expert_gradients_doubled,
        document_mask_off_by_one,
        expert_norm_not_summed_over_tp,
        experts_missing_from_norm,
        clip_factor_for_each_group,
        router_counts_not_summed_over_tp,
        router_counts_not_summed_over_replicas,
        router_bias_multiplied_by_tp,
        replicated_bias_multiplied_by_tp,
        uneven_vocabulary_cut_without_padding,
        evaluation_moves_router_bias,
        products_in_tf32,
        attention_across_documents,
    )
}
