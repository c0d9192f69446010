"""Linear layers and embedding that megatron-core splits over tensor-parallel ranks.

Between layers every rank of the group has all activations, or with sequence parallel (Korthikanti et al. 2022) its
share of the sequence. A `Region` converts them to what split layers take: enter it once, go through column layers, and
leave it through a row layer. At tp=1 a weight goes through a plain `F.linear`, so that `torch.compile` compiles a
block as one graph.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pretrain.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from pretrain.model import flat_collectives
from pretrain.model.layer_context import LayerContext
from pretrain.model.products import add_product, linear, product, widened
from pretrain.model.slices import Marks, Partial, TensorSplit, mark


class _Whole:
    """A tensor-parallel group of one rank. megatron-core would take None for the tp group that was set up last."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


_WHOLE: Any = _Whole()


def padded_to_multiple(size: int, unit: int) -> int:
    """Returns the smallest multiple of `unit` that is at least `size`."""
    return -(-size // unit) * unit


def _no_init(weight: torch.Tensor) -> torch.Tensor:
    return weight


class _ContiguousGradient(torch.autograd.Function):
    """Returns its input; makes the gradient contiguous, since megatron-core's all-reduce leaves others unsummed."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous()


class Region:
    """Converts activations at the entry to and the exit from layers split over tp; does nothing at tp=1.

    Outside activations are [S, ...] on every rank, or with sequence parallel [S/tp, ...]; inside they are [S, ...].
    """

    def __init__(self, context: LayerContext):
        self.group, self.tp, self.sequence_parallel = context.tp, context.tp_size, context.sp
        self.weights_come_by_call = context.weights_come_by_call

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Gives the whole sequence; the backward pass sums the ranks' partial gradients once for all layers."""
        if self.tp == 1:
            return x
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(x, True, self.group)
        return self.copy(x)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Gives the whole sequence for work that every rank does alike; the backward pass sums nothing."""
        return gather_from_sequence_parallel_region(x, False, self.group) if self.sequence_parallel else x

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """Passes the whole sequence to split layers; the backward pass sums the ranks' partial gradients."""
        if self.tp == 1:
            return x
        return _ContiguousGradient.apply(copy_to_tensor_model_parallel_region(x, self.group))

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """Sums the ranks' partial outputs."""
        if self.tp == 1:
            return y
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(y, self.group)
        return reduce_from_tensor_model_parallel_region(y.contiguous(), self.group)


class Adapter(Protocol):
    """The adapter of a linear layer, if it has one; see `pretrain.model.adapters.low_rank`."""

    rank: int

    def reduced(self, x: torch.Tensor) -> torch.Tensor:
        """Computes [..., rank] from the layer's inputs, outside of split layers."""

    def added(self, y: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns the adapted output."""


class ColumnLinear(ColumnParallelLinear):
    """Computes y = x Wᵀ with W [out, in] split over its rows: every rank computes out/tp of the outputs.

    Where tp does not divide the rows, the last ones are zeros, and so are their outputs. With `copies` every row is on
    so many neighbouring ranks, and each of them has a part of its gradient. The gradient of x is partial, too;
    `Region.enter` sums it over ranks.
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        context: LayerContext,
        copies: int = 1,
        bias: bool = False,
        std_factor: float = 1.0,
    ):
        super().__init__(
            size_in,
            padded_to_multiple(size_out * copies, context.tp_size),
            config=context.megatron,
            init_method=_no_init,
            bias=False,
            tp_group=context.tp or _WHOLE,
            gather_output=False,
            disable_grad_reduce=True,
        )
        self.adapter: Adapter | None = None
        self.sequence_parallel = False  # x is the whole sequence already
        split = TensorSplit(0, size_out, copies) if self.is_split else None
        mark(self.weight, Marks(split=split, std_factor=std_factor))
        if bias:
            self.bias = nn.Parameter(self.weight.new_empty(len(self.weight)))
            mark(self.bias, Marks(split=split, constant=0.0, decays=False))

    @property
    def is_split(self) -> bool:
        return self.output_size_per_partition != self.output_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[0] if self.is_split else linear(x, self.weight, self.bias)


def columns(x: torch.Tensor, region: Region, *layers: ColumnLinear) -> tuple[torch.Tensor, ...]:
    """Enters the region and computes several column layers of the same input."""
    plain = region.tp == 1 and (torch.compiler.is_compiling() or not torch.is_grad_enabled())
    if plain or region.weights_come_by_call:
        entered = region.enter(x)
        outputs = tuple(layer(entered) for layer in layers)
    else:
        outputs = _columns(x, region, *(layer.weight for layer in layers))
        outputs = tuple(y if layer.bias is None else y + layer.bias for y, layer in zip(outputs, layers, strict=True))
    adapters = [layer.adapter for layer in layers if layer.adapter is not None]
    if not adapters:
        return outputs
    reduced = torch.cat([adapter.reduced(x) for adapter in adapters], -1)
    parts = iter(region.enter(reduced).split([adapter.rank for adapter in adapters], -1))
    return tuple(
        y if layer.adapter is None else layer.adapter.added(y, next(parts), layer.bias)
        for y, layer in zip(outputs, layers, strict=True)
    )


@torch.compiler.disable  # the compiler does not know how to wait for the sums over ranks
def _columns(x: torch.Tensor, region: Region, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _Columns.apply(region, x, *weights)


class _Columns(torch.autograd.Function):
    """Computes x Wᵀ for several weights, and the gradient of x as one sum.

    Over tensor-parallel ranks that sum is taken while the gradients of the weights are computed. With sequence parallel
    x is stored as this rank's share, and is gathered again while its gradient is computed (Korthikanti et al. 2022).
    """

    @staticmethod
    def forward(ctx: Any, region: Region, x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.region, x = region, x.contiguous()
        ctx.save_for_backward(x, *weights)
        if region.sequence_parallel:
            x, gathering = _start_gather(x, region)
            gathering.wait()
        rows = widened(x.view(-1, x.shape[-1]))
        products = (product(rows, weight.t(), x.dtype) for weight in weights)
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in products)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        region: Region = ctx.region
        gathering = summing = None
        whole, is_trained = x, ctx.needs_input_grad[2:]
        if region.sequence_parallel and any(is_trained):
            whole, gathering = _start_gather(x, region)
        flat = [widened(grad.reshape(-1, grad.shape[-1])) for grad in grads]
        total = product(flat[0], weights[0])
        for grad, weight in zip(flat[1:], weights[1:], strict=True):
            add_product(total, grad, weight)
        grad_x = total = total.to(x.dtype).view(*grads[0].shape[:-1], x.shape[-1])
        if region.sequence_parallel:
            grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
            summing = flat_collectives.reduce_scatter(grad_x, total, group=region.group, async_op=True)
        elif region.tp > 1:
            summing = dist.all_reduce(total, group=region.group, async_op=True)
        if gathering is not None:
            gathering.wait()
        rows = widened(whole.reshape(-1, whole.shape[-1])) if any(is_trained) else whole
        grad_weights = [
            product(grad.t(), rows, x.dtype) if trained else None
            for grad, trained in zip(flat, is_trained, strict=True)
        ]
        if summing is not None:
            summing.wait()
        return None, grad_x, *grad_weights


def _start_gather(x: torch.Tensor, region: Region) -> tuple[torch.Tensor, dist.Work]:
    """Begins to gather the ranks' shares; returns the tensor for them, too. The caller keeps `x` until they are there.

    `x` is contiguous.
    """
    whole = x.new_empty(len(x) * region.tp, *x.shape[1:])
    return whole, flat_collectives.all_gather(whole, x, group=region.group, async_op=True)


class RowLinear(RowParallelLinear):
    """Computes y = x Wᵀ with W [out, in] split over its columns: every rank has in/tp of the inputs.

    The ranks' outputs are partial and summed, and the bias is added to the sum. With sequence parallel each rank keeps
    its share of the sum.
    """

    def __init__(self, size_in: int, size_out: int, context: LayerContext, bias: bool = False, std_factor: float = 1.0):
        super().__init__(
            size_in,
            size_out,
            config=context.megatron,
            init_method=_no_init,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=context.tp or _WHOLE,
        )
        self.adapter: Adapter | None = None
        split = TensorSplit(1, size_in) if self.is_split else None
        mark(self.weight, Marks(split=split, std_factor=std_factor))
        if bias:
            self.bias = nn.Parameter(self.weight.new_empty(size_out))
            mark(self.bias, Marks(partial="sequence", constant=0.0, decays=False))

    @property
    def is_split(self) -> bool:
        return self.input_size_per_partition != self.input_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)[0] if self.is_split else linear(x, self.weight, self.bias)
        return y if self.adapter is None else self.adapter.added(y, self.adapter.reduced(x), self.bias)


class WholeLinear(nn.Module):
    """Computes y = x Wᵀ with a weight [out, in] that every tensor-parallel rank holds whole."""

    def __init__(self, size_in: int, size_out: int, context: LayerContext, partial: Partial = "sequence"):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in, dtype=context.dtype, device=context.device))
        mark(self.weight, Marks(partial=partial))
        self.adapter: Adapter | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = linear(x, self.weight)
        return y if self.adapter is None else self.adapter.added(y, self.adapter.reduced(x), None)


class Embedding(VocabParallelEmbedding):
    """Token embedding [V, H] split over the vocabulary; the lookups are summed over tp.

    Where tp does not divide the vocabulary, the last rows are zeros that no token looks up. Takes [B, S], gives
    [S, B, H], or with sequence parallel this rank's [S/tp, B, H].
    """

    def __init__(self, vocab_size: int, hidden_size: int, context: LayerContext):
        super().__init__(
            padded_to_multiple(vocab_size, context.tp_size),
            hidden_size,
            init_method=_no_init,
            reduce_scatter_embeddings=context.sp,
            config=context.megatron,
            tp_group=context.tp or _WHOLE,
        )
        self.is_split = context.tp_size > 1
        mark(self.weight, Marks(split=TensorSplit(0, vocab_size) if self.is_split else None))

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        if self.reduce_scatter_embeddings:
            return super().forward(tokens_BS)  # megatron-core transposes on its way
        tokens_SB = tokens_BS.t()
        return super().forward(tokens_SB) if self.is_split else F.embedding(tokens_SB, self.weight)
