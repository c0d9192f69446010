"""SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

import torch
import torch.nn.functional as F
from torch import nn

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
        return self.down_proj(F.silu(gate) * up)
