"""Rotary position embedding (Su et al. 2021), in the half-rotation layout that transformers' LLaMA uses."""

import torch


def rotary_angles(positions_BS: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes cos and sin [S, B, 1, head_dim] in fp32 at the given positions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_BS.device) / head_dim
    angles = positions_BS.t()[:, :, None, None].float() * (1.0 / theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_SBND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates every pair (x_i, x_{i+D/2}) by its angle."""
    first, second = x_SBND.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_SBND * cos.to(x_SBND.dtype) + turned * sin.to(x_SBND.dtype)
