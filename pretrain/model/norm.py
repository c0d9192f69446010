"""RMSNorm (Zhang and Sennrich 2019): x / rms(x) * weight, the statistics in fp32 or better."""

from typing import Any

import torch
from torch import nn

from pretrain.model.cache_parts import in_parts


class RMSNorm(nn.Module):
    """Normalizes the last dimension, of `size` elements."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if x.dtype == self.weight.dtype == wide and not torch.compiler.is_compiling():
            return _Normalized.apply(x, self.weight, self.eps)
        scaled = x.to(wide)
        scaled = scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class _Normalized(torch.autograd.Function):
    """Computes in fp32 or fp64 what the module does; stores of each vector its input and one number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y = torch.empty_like(x)
        factor = torch.empty_like(x[..., :1])
        for x_part, y_part, factor_part in in_parts(x, y, factor):
            torch.linalg.vector_norm(x_part, dim=-1, keepdim=True, out=factor_part)
            factor_part.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            torch.mul(x_part, factor_part, out=y_part)
            y_part.mul_(weight)
        ctx.save_for_backward(x, weight, factor)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, factor = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        for own_grad, x_part, factor_part, grad_x_part in in_parts(grad, x, factor, grad_x):
            normed = x_part * factor_part
            grad_weight += (own_grad * normed).flatten(0, -2).sum(0)
            torch.mul(own_grad, weight, out=grad_x_part)
            along = (grad_x_part * normed).mean(-1, keepdim=True)
            grad_x_part.addcmul_(normed, along, value=-1).mul_(factor_part)
        return grad_x, grad_weight, None
