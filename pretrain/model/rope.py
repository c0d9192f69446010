"""Rotary position embedding (Su et al. 2021), in the half-rotation layout that transformers' LLaMA uses."""

from typing import Any

import torch

from pretrain.model.cache_parts import in_parts


def rotary_angles(positions_BS: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes cos and sin [S, B, 1, head_dim] in fp32 at the given positions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    angles = positions_BS.t()[:, :, None, None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_SBND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates every pair (x_i, x_{i+D/2}) by its angle."""
    cos, sin = cos.to(x_SBND.dtype), sin.to(x_SBND.dtype)
    if not torch.compiler.is_compiling():
        return _Rotated.apply(x_SBND, cos, sin)
    first, second = x_SBND.chunk(2, dim=-1)
    return x_SBND * cos + torch.cat((-second, first), dim=-1) * sin


class _Rotated(torch.autograd.Function):
    """Computes what `rotate` does; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, way: float) -> torch.Tensor:
    """Rotates by the angles, or with `way` -1 by their negatives; both halves of `cos` and `sin` are alike."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for x_part, y_part, cos_part, sin_part in in_parts(x, y, cos, sin):
        torch.mul(x_part, cos_part, out=y_part)
        for own, other, sin_half, sign in zip(
            y_part.chunk(2, -1), reversed(x_part.chunk(2, -1)), sin_part.chunk(2, -1), (-way, way), strict=True
        ):
            own.addcmul_(other, sin_half, value=sign)
    return y
