"""Dropout (Srivastava et al. 2014) whose mask is a function of (seed, place in the model, sample), and of nothing else.

No random state is kept: any layout draws the same mask, each rank takes its part of it, and recomputed activations
meet the mask that they met before.
"""

import hashlib

import torch
from torch import nn

from pretrain.model.build import Build


class Dropout(nn.Module):
    """Zeros a share `build.dropout` of hidden states in training and scales up the rest.

    `place` is a global name, the same in every layout.
    """

    def __init__(self, place: str, build: Build):
        super().__init__()
        self.place, self.rate, self.seed = place, build.dropout, build.seed
        self.part, self.parts = build.sequence_part

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
        digest = hashlib.sha256(f"{self.seed}/{self.place}/{sample}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.rand(length, hidden, generator=generator, device=device) >= self.rate
