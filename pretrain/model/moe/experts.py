"""Experts as stacked weights [E, ...], computed over rows sorted by expert.

On GPUs in bf16 the products of all experts are one grouped product; elsewhere experts are computed one by one.

Tensor parallel splits each expert like a dense MLP, so that outputs are partial sums; expert parallel gives each rank
its share of the experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from configs.model import LayerConfig
from configs.model_size import is_gated
from pretrain.model.layer_context import LayerContext
from pretrain.model.layers import ACTIVATIONS
from pretrain.model.products import add_product, linear, multiply, product
from pretrain.model.slices import Marks, TensorSplit, mark

ROWS_ALIGNED = 8  # CUDA's grouped product wants groups of rows that start at 16 bytes: 8 numbers in bf16
STRIDE_BYTES = 16  # the grouped product wants rows of matrices that are a multiple of this long


class Experts(nn.Module):
    """This rank's experts of one layer."""

    def __init__(self, config: LayerConfig, context: LayerContext):
        super().__init__()
        moe, hidden, size, tp = config.moe, config.hidden_size, config.expert_size, context.tp_size
        assert moe is not None
        local, ffn, self.kind = moe.num_experts // context.ep_size, size // tp, config.mlp.kind
        inner, output = config.inner_std_factor, config.output_std_factor

        def weight(*shape: int, marks: Marks) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(local, *shape, dtype=context.dtype, device=context.device))
            split = marks.split if tp > 1 else None
            mark(parameter, replace(marks, split=split, is_expert=True))
            return parameter

        is_split_1, is_split_2 = TensorSplit(1, size), TensorSplit(2, size)
        if is_gated(self.kind):
            self.gate_proj = weight(ffn, hidden, marks=Marks(split=is_split_1, std_factor=inner))
        self.up_proj = weight(ffn, hidden, marks=Marks(split=is_split_1, std_factor=inner))
        self.down_proj = weight(hidden, ffn, marks=Marks(split=is_split_2, std_factor=output))
        self.has_bias, self.down_bias_parts = config.mlp.bias, tp
        if self.has_bias:
            zeros = Marks(split=is_split_1, constant=0.0, decays=False)
            if is_gated(self.kind):
                self.gate_bias = weight(ffn, marks=zeros)
            self.up_bias = weight(ffn, marks=zeros)
            # Outputs of tensor-parallel ranks are summed, so each adds its share of this bias and has a part of its
            # gradient.
            self.down_bias = weight(hidden, marks=Marks(partial="heads", constant=0.0, decays=False))
        self.adapter = nn.ModuleDict()  # by the name of the matrix that is adapted: rows and an expert to an addition

    def forward(self, x_RH: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Computes outputs [R, H] of rows sorted by expert; the first `counts[0]` rows are the first expert's.

        Rows past the last expert's are not computed, and their outputs are undefined.
        """
        if self.kind != "swiglu" or self.has_bias or len(self.adapter):
            return self._one_by_one(x_RH, counts)
        if x_RH.device.type != "cpu" and x_RH.dtype == torch.bfloat16 and len(x_RH):
            return self._aligned(x_RH, counts)
        return _by_loop(x_RH, on_host(counts, x_RH), self.gate_proj, self.up_proj, self.down_proj)[0]

    @torch.compiler.disable  # the loop over counts would be built anew for each count
    def _one_by_one(self, x_RH: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Computes one expert after another by autograd: any activation, with or without biases."""
        sizes = on_host(counts, x_RH).numpy().tolist()
        outputs = []
        rows = x_RH.split([*sizes, len(x_RH) - sum(sizes)])
        for expert, given in enumerate(rows[:-1]):
            own = _widened(given, 0, rows_of_product(len(given), given.dtype) - len(given))
            names = ("gate", "up") if is_gated(self.kind) else ("up",)
            inner = ACTIVATIONS[self.kind](*(self._projected(own, name, expert) for name in names))
            output = linear(inner, self.down_proj[expert])
            if "down_proj" in self.adapter:
                output = output + self.adapter["down_proj"](inner, expert)
            output = output[: len(given)]
            outputs.append(output + self.down_bias[expert] / self.down_bias_parts if self.has_bias else output)
        return torch.cat([*outputs, torch.zeros_like(rows[-1])])

    def _projected(self, rows: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        output = linear(rows, getattr(self, f"{name}_proj")[expert], bias)
        adapter = f"{name}_proj"
        return output + self.adapter[adapter](rows, expert) if adapter in self.adapter else output

    def _grouped(self, x_RH: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Uses the grouped product; pads H and F with zeros, which add nothing, to the multiples that it requires."""
        ends = counts.cumsum(0).to(torch.int32)
        multiple, hidden_size = STRIDE_BYTES // x_RH.element_size(), x_RH.shape[1]
        more_H, more_F = -hidden_size % multiple, -self.gate_proj.shape[1] % multiple
        x_RH = _widened(x_RH, more_H)
        gate, up = (_widened(w, more_H, more_F).transpose(1, 2) for w in (self.gate_proj, self.up_proj))
        down = _widened(self.down_proj, more_F, more_H).transpose(1, 2)
        inner = F.silu(F.grouped_mm(x_RH, gate, offs=ends)) * F.grouped_mm(x_RH, up, offs=ends)
        return F.grouped_mm(inner, down, offs=ends)[:, :hidden_size]

    def _aligned(self, x_RH: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Puts rows of zeros between experts, so that every expert's first row is aligned as CUDA requires."""
        padded = (counts + ROWS_ALIGNED - 1) // ROWS_ALIGNED * ROWS_ALIGNED
        rows = torch.arange(len(x_RH), device=x_RH.device)
        shift = F.pad((padded - counts).cumsum(0), (1, 0))  # how far an expert's rows move, and those past the last
        indices = rows + shift[torch.searchsorted(counts.cumsum(0), rows, right=True)]
        spread = x_RH.new_zeros(len(x_RH) + len(counts) * ROWS_ALIGNED, x_RH.shape[1]).index_copy(0, indices, x_RH)
        return self._grouped(spread, padded).index_select(0, indices)


def on_host(counts: torch.Tensor, x_RH: torch.Tensor) -> torch.Tensor:
    """Asks the device how many of the rows `x_RH` each expert has."""
    return counts.cpu()


def _widened(matrices: torch.Tensor, columns: int, rows: int = 0) -> torch.Tensor:
    """Appends columns and rows of zeros to matrices; returns the same tensor, not a copy, where both numbers are 0."""
    return F.pad(matrices, (0, columns, 0, rows)) if columns or rows else matrices


def rows_of_product(count: int, dtype: torch.dtype) -> int:
    """Returns how many rows a product of an expert's `count` rows takes; those beyond its own are zeros.

    For products in bf16 a CPU's library builds code for every new number of rows, which takes several times as long as
    the product, and each batch gives the experts other numbers. So they are rounded up, by at most a sixteenth or 15.
    """
    step = max(16, 1 << max(0, count.bit_length() - 5)) if dtype == torch.bfloat16 else 1
    return -(-count // step) * step


def most_rows(count: int, experts: int) -> int:
    """Returns the most rows that the products of all experts take together for `count` rows."""
    return count + count // 16 + 15 * experts


# An operator of its own: the compiler would build a loop over counts anew for each count.
@torch.library.custom_op("trivium::experts", mutates_args=())
def _by_loop(
    x_RH: torch.Tensor, counts: torch.Tensor, gate_proj: torch.Tensor, up_proj: torch.Tensor, down_proj: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes one expert after another; `counts` are on the host. Returns outputs and what backward needs."""
    out, gate, up, silu, inner = _empty_outputs(x_RH, counts, gate_proj, up_proj, down_proj)
    for expert, own, filled in _spans(counts, x_RH.dtype):
        x = _filled(x_RH[own], filled)
        multiply(x, gate_proj[expert].t(), gate[filled])
        multiply(x, up_proj[expert].t(), up[filled])
        torch.ops.aten.silu.out(gate[filled], out=silu[filled])
        torch.mul(silu[filled], up[filled], out=inner[filled])
        if len(x) == own.stop - own.start:
            multiply(inner[filled], down_proj[expert].t(), out[own])
        else:
            out[own] = product(inner[filled], down_proj[expert].t())[: own.stop - own.start]
    return out, gate, up, silu, inner


@_by_loop.register_fake
def _empty_outputs(
    x_RH: torch.Tensor, counts: torch.Tensor, gate_proj: torch.Tensor, up_proj: torch.Tensor, down_proj: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = most_rows(len(x_RH), len(gate_proj)) if x_RH.dtype == torch.bfloat16 else len(x_RH)
    gate, up, silu, inner = (x_RH.new_empty(rows, gate_proj.shape[1]) for _ in range(4))
    return x_RH.new_empty(x_RH.shape), gate, up, silu, inner


@torch.library.custom_op("trivium::experts_backward", mutates_args=())
def _by_loop_backward(
    grad: torch.Tensor,
    x_RH: torch.Tensor,
    counts: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    silu: torch.Tensor,
    inner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of x and of the three weights; those of rows past the last expert's are 0."""
    gradients = _empty_gradients(grad, x_RH, counts, gate_proj, up_proj, down_proj, gate, up, silu, inner)
    grad_x, grad_gate_proj, grad_up_proj, grad_down_proj = gradients
    grad_x[counts.numpy().sum() :] = 0
    for expert, own, filled in _spans(counts, x_RH.dtype):
        x, own_grad = _filled(x_RH[own], filled), _filled(grad[own], filled)
        multiply(own_grad.t(), inner[filled], grad_down_proj[expert])
        grad_inner = product(own_grad, down_proj[expert])
        grad_up = grad_inner * silu[filled]
        grad_gate = torch.ops.aten.silu_backward(grad_inner.mul_(up[filled]), gate[filled])
        multiply(grad_gate.t(), x, grad_gate_proj[expert])
        multiply(grad_up.t(), x, grad_up_proj[expert])
        if len(x) == own.stop - own.start:
            multiply(grad_gate, gate_proj[expert], grad_x[own])
            add_product(grad_x[own], grad_up, up_proj[expert])
        else:
            both = add_product(product(grad_gate, gate_proj[expert]), grad_up, up_proj[expert])
            grad_x[own] = both[: own.stop - own.start]
    return gradients


@_by_loop_backward.register_fake
def _empty_gradients(
    grad: torch.Tensor,
    x_RH: torch.Tensor,
    counts: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    silu: torch.Tensor,
    inner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_x, *weights = (x.new_empty(x.shape) for x in (x_RH, gate_proj, up_proj, down_proj))
    return grad_x, weights[0], weights[1], weights[2]


def _spans(counts: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, slice, slice]]:
    """Yields for every expert (its number, its rows, the rows of its products); a product of no rows is zeros."""
    start = first = 0
    for expert, count in enumerate(counts.numpy().tolist()):
        rows = rows_of_product(count, dtype)
        yield expert, slice(start, start + count), slice(first, first + rows)
        start, first = start + count, first + rows


def _filled(rows: torch.Tensor, filled: slice) -> torch.Tensor:
    """Appends rows of zeros, so that there are as many as in `filled`; returns the same tensor if there are already."""
    return _widened(rows, 0, filled.stop - filled.start - len(rows))


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # of the outputs only the first has a gradient
    ctx.save_for_backward(*inputs, *output[1:])


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    backward: Callable[..., Any] = _by_loop_backward
    grad_x, *weights = backward(grad, *ctx.saved_tensors)
    return grad_x, None, *weights


_by_loop.register_autograd(_backward, setup_context=_keep)
