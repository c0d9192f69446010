"""Bottleneck adapters (Houlsby et al. 2019): a small MLP with a residual connection after attention and after the MLP.

y becomes y + W_up f(W_down y + b_down) + b_up, with W_down [m, H] and W_up [H, m]. It is computed before the block adds
y to the residual stream, and before a norm of y if the block has one. W_up and b_up begin at zero, so that the model
begins exactly as its base; the paper draws both matrices near zero. With `after = ["mlp"]` it is the adapter of
Pfeiffer et al. (2021), one a block.

Every tensor-parallel rank computes the whole adapter, since all of them have y. Sequence parallel gives a rank its own
tokens, and so a part of the gradient.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from configs.adapters import AdapterConfig
from pretrain.model.adapters.parameters import new_parameter
from pretrain.model.layer_context import LayerContext
from pretrain.model.slices import Marks

STD_OF_DOWN = 1e-2  # Houlsby et al., section 3.6
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Bottleneck(nn.Module):
    """The adapter of hidden states [S, B, H]; `std` is the deviation of W_up's first values, 0 in training."""

    def __init__(self, hidden_size: int, config: AdapterConfig, context: LayerContext, std: float):
        super().__init__()
        self.activation, size = ACTIVATIONS[config.activation], config.bottleneck_size
        zeros = Marks(partial="sequence", constant=0.0, decays=False)
        up = Marks(partial="sequence", std=std) if std else Marks(partial="sequence", constant=0.0)
        self.down = new_parameter(context, (size, hidden_size), Marks(partial="sequence", std=STD_OF_DOWN))
        self.down_bias = new_parameter(context, (size,), zeros)
        self.up = new_parameter(context, (hidden_size, size), up)
        self.up_bias = new_parameter(context, (hidden_size,), zeros)

    def forward(self, y_SBH: torch.Tensor) -> torch.Tensor:
        inner = self.activation(F.linear(y_SBH, self.down, self.down_bias))
        return y_SBH + F.linear(inner, self.up, self.up_bias)
