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

    def forward(self, x_SBH: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
        """Applies the masks of the rows numbered `samples` in the run; S is this rank's part of the sequence."""
        if not (self.training and self.rate):
            return x_SBH
        assert samples is not None, "dropout is keyed by sample"
        key = f"{self.seed}/{self.name}"
        kept = _kept(x_SBH.detach(), samples, key, self.rate, self.part, self.parts)
        return x_SBH * kept.to(x_SBH.dtype) / (1 - self.rate)


# An operator of its own, so that compiled code sees numbers of samples as a tensor and is not built anew for others.
@torch.library.custom_op("trivium::dropout_kept", mutates_args=())
def _kept(like: torch.Tensor, samples: torch.Tensor, key: str, rate: float, part: int, parts: int) -> torch.Tensor:
    """Draws which elements of `like` [S, B, H] are kept; `samples` [B] is on the host."""
    length, _, hidden = like.shape
    masks = []
    for sample in samples.numpy().tolist():
        digest = hashlib.sha256(f"{key}/{sample}".encode()).digest()
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        whole = torch.rand(length * parts, hidden, generator=generator, device=like.device) >= rate
        masks.append(whole.chunk(parts)[part])
    return torch.stack(masks, dim=1)


@_kept.register_fake
def _all_kept(like: torch.Tensor, samples: torch.Tensor, key: str, rate: float, part: int, parts: int) -> torch.Tensor:
    return torch.empty_like(like, dtype=torch.bool, memory_format=torch.contiguous_format)
