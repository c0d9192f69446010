"""SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.model.cache_parts import in_parts
from pretrain.model.layer_context import LayerContext
from pretrain.model.linear import ColumnLinear, Region, RowLinear, columns


class MLP(nn.Module):
    """The feed-forward part of a block; takes and gives hidden states [S, B, H]."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, context: LayerContext):
        super().__init__()
        self.region = Region(context)
        self.gate_proj = ColumnLinear(hidden_size, ffn_hidden_size, context)
        self.up_proj = ColumnLinear(hidden_size, ffn_hidden_size, context)
        self.down_proj = RowLinear(ffn_hidden_size, hidden_size, context)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        gate, up = columns(x_SBH, self.region, self.gate_proj, self.up_proj)
        return self.down_proj(gated(gate, up))


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Computes silu(gate) * up."""
    return F.silu(gate) * up if torch.compiler.is_compiling() else _Gated.apply(gate, up)


class _Gated(torch.autograd.Function):
    """Computes what `gated` does and stores the inputs alone."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return gated_values(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gated_gradients(grad, *ctx.saved_tensors)


def gated_values(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Computes silu(gate) * up, unseen by autograd."""
    inner = torch.empty_like(gate)
    for gate_part, up_part, inner_part in in_parts(gate, up, inner):
        torch.mul(F.silu(gate_part), up_part, out=inner_part)
    return inner


def gated_gradients(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the gradients of `gate` and `up`."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    for own, gate_part, up_part, grad_gate_part, grad_up_part in in_parts(grad, gate, up, grad_gate, grad_up):
        torch.mul(F.silu(gate_part), own, out=grad_up_part)
        torch.ops.aten.silu_backward.grad_input(own * up_part, gate_part, grad_input=grad_gate_part)
    return grad_gate, grad_up
