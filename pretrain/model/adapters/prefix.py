"""Prefix tuning (Li and Liang 2021) and P-tuning v2 (Liu et al. 2022): trained keys and values before every document.

In every layer n keys and values stand before those of a document's tokens, at positions 0 to n - 1. They are taken as
they are: positions do not rotate them. P-tuning v2 trains them themselves. Prefix tuning makes those of all layers
from n small vectors by an MLP, W_2 tanh(W_1 p + b_1) + b_2, whose first layer all layers share and whose second has
rows for each layer (section 4.3); it steadies training.

Tensor parallel splits keys and values over heads, as it splits the layers that make a token's. Every pipeline stage has
a copy of what all layers share, whose gradients are summed over stages.
"""

import torch
import torch.nn.functional as F
from torch import nn

from configs.adapters import AdapterConfig
from pretrain.model.adapters.parameters import new_parameter
from pretrain.model.adapters.prompt import linear
from pretrain.model.attention import GroupedAttention
from pretrain.model.layer_context import LayerContext
from pretrain.model.slices import Marks, TensorSplit
from pretrain.model.tensor_parallel import Region


class PrefixEncoder(nn.Module):
    """The part of the MLP that all layers share: n vectors and their tanh features [n, m]."""

    def __init__(self, size: int, config: AdapterConfig, context: LayerContext):
        super().__init__()
        self.embedding = new_parameter(context, (config.virtual_tokens, size), Marks(on_every_stage=True))
        self.hidden = linear(size, config.encoder_size, context, on_every_stage=True)

    def forward(self) -> torch.Tensor:
        return torch.tanh(self.hidden(self.embedding))


class Prefix(nn.Module):
    """The keys and values of one layer that stand before every document, of this rank's heads."""

    def __init__(
        self,
        attention: GroupedAttention,
        num_kv_heads: int,
        config: AdapterConfig,
        context: LayerContext,
        encoder: PrefixEncoder | None,
    ):
        super().__init__()
        size, self.head_dim, self.region = num_kv_heads * attention.head_dim, attention.head_dim, Region(context)
        self._encoder = [] if encoder is None else [encoder]  # in a list: its parameters are the decoder's
        copies = max(1, context.tp_size // num_kv_heads)  # ranks with the same key-value head
        own = size * copies // context.tp_size

        def split(dim: int) -> TensorSplit | None:
            return TensorSplit(dim, size, copies) if context.tp_size > 1 else None

        if encoder is None:
            shape = config.virtual_tokens, own
            self.keys, self.values = (new_parameter(context, shape, Marks(split=split(1))) for _ in range(2))
        else:
            weights, biases = Marks(split=split(0)), Marks(split=split(0), constant=0.0, decays=False)
            shape = own, config.encoder_size
            self.key_weight, self.value_weight = (new_parameter(context, shape, weights) for _ in range(2))
            self.key_bias, self.value_bias = (new_parameter(context, (own,), biases) for _ in range(2))

    def vectors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and the values of this rank's heads, [n, heads * D] each."""
        if not self._encoder:
            return self.keys, self.values
        features = self.region.copy(self._encoder[0]())
        keys = F.linear(features, self.key_weight, self.key_bias)
        return keys, F.linear(features, self.value_weight, self.value_bias)

    def forward(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the prefix before the keys and values [S, B, K, D] of tokens; both become [n + S, B, K, D]."""
        heads = (own.unflatten(-1, (1, -1, self.head_dim)).expand(-1, k.shape[1], -1, -1) for own in self.vectors())
        first_k, first_v = heads
        return torch.cat((first_k, k)), torch.cat((first_v, v))
