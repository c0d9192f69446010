"""Dropout (Srivastava et al. 2014) whose mask is a function of (seed, layer's name, sample), and of nothing else.

No random state is kept: any layout draws the same mask, each rank takes its part of it, and recomputed activations
meet the mask that they met before.
"""

import hashlib

import torch
from torch import nn

from pretrain.model.layer_context import LayerContext


class Dropout(nn.Module):
    """Zeros a share `context.dropout` of hidden states in training and scales up the rest.

    `name` is the layer's global name, the same in every layout.
    """

    def __init__(self, name: str, context: LayerContext):
        super().__init__()
        self.name, self.rate, self.seed = name, context.dropout, context.seed
        self.part, self.parts = context.sequence_part

    def forward(self, x_SBH: torch.Tensor, samples: tuple[int, ...] | None) -> torch.Tensor:
        """`samples` are the numbers of the rows in the run. S is this rank's part of the sequence."""
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
