"""The scalar head: a few values of each token in place of logits of the vocabulary."""

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.model.layer_context import LayerContext
from pretrain.model.slices import Marks, mark

NAME = "value_head.weight"  # the global name of its only parameter
# The factor on init_std: the first values are near zero also where hidden states are wide.
STD_FACTOR = 0.1


class ValueHead(nn.Module):
    """Computes K values of each token from its final hidden state: a reward, a value estimate, or logits of classes.

    Every tensor-parallel rank holds the whole weight [K, H] and sees whole sequences, so all of them compute the same.
    Values are computed in fp32 at least.
    """

    def __init__(self, hidden_size: int, outputs: int, context: LayerContext):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, hidden_size, dtype=context.dtype, device=context.device))
        mark(self.weight, Marks(std_factor=STD_FACTOR))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gives [..., K] of hidden states [..., H]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))
