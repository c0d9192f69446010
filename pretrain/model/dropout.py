"""Dropout (Srivastava et al. 2014) whose mask is a function of (seed, layer name, sample) and of nothing else.

There is no random state: every layout draws the same mask, each rank takes its part of it, and activations that are
computed again get the same mask again.
"""

import hashlib

import torch
from torch import nn

from pretrain.model.layer_context import LayerContext


class Dropout(nn.Module):
    """Sets a share `context.dropout` of hidden states to zero in training and scales up the rest.

    `name` is the global name of the layer, the same in every layout.
    """

    def __init__(self, name: str, context: LayerContext):
        super().__init__()
        self.name, self.rate, self.seed = name, context.dropout, context.seed
        self.part, self.parts = context.sequence_part

    def forward(self, x_SBH: torch.Tensor, samples: tuple[int, ...] | None) -> torch.Tensor:
        """Applies the masks of the rows numbered `samples` in the run; S is this rank's part of the sequence."""
        if not (self.training and self.rate):
            return x_SBH
        assert samples is not None, "dropout is keyed by sample"
        length, _, hidden = x_SBH.shape
        drawn = [self._draw(sample, length * self.parts, hidden, x_SBH.device) for sample in samples]
        kept = torch.stack([mask.chunk(self.parts)[self.part] for mask in drawn], dim=1)
        return x_SBH * kept.to(x_SBH.dtype) / (1 - self.rate)

    def _draw(self, sample: int, length: int, hidden: int, device: torch.device) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}/{self.name}/{sample}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.rand(length, hidden, generator=generator, device=device) >= self.rate
