"""RMSNorm (Zhang and Sennrich 2019): x / rms(x) * weight, the statistics in fp32 or better."""

import torch
from torch import nn


class RMSNorm(nn.Module):
    """Normalizes the last dimension, of `size` elements."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
