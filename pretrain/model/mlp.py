"""SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from configs.train import ModelConfig
from pretrain.model.linear import ColumnLinear, Region, RowLinear
from pretrain.model.megatron import ModelParallelConfig


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, layer_config: ModelParallelConfig, tp_group: ProcessGroup | None):
        super().__init__()
        self.region = Region(layer_config, tp_group)
        self.gate_proj = ColumnLinear(config.hidden_size, config.ffn_hidden_size, layer_config, tp_group)
        self.up_proj = ColumnLinear(config.hidden_size, config.ffn_hidden_size, layer_config, tp_group)
        self.down_proj = RowLinear(config.ffn_hidden_size, config.hidden_size, layer_config, tp_group)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        x_SBH = self.region.enter(x_SBH)
        return self.down_proj(F.silu(self.gate_proj(x_SBH)) * self.up_proj(x_SBH))
