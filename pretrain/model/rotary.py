"""Rotary position embedding (Su et al. 2021), and the ways to extend it to longer contexts.

The frequency of dimension pair i is theta^(-2i/d) for d rotated elements of a head. The kinds of scaling are linear
(Chen et al. 2023), dynamic NTK, Llama 3.1's, YaRN (Peng et al. 2023) and LongRoPE (Ding et al. 2024), with the numbers
that transformers takes.
"""

import math
from typing import Any

import torch

from configs.model_parts import PositionConfig, RopeScalingConfig
from pretrain.model.cache_parts import in_parts
from pretrain.model.native import elementwise


def rotary_angles(
    positions_BS: torch.Tensor, position: PositionConfig, size: int, lengths_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes cos and sin [S, B, 1, size] in fp32 at the given positions, for `size` rotated elements.

    `lengths_BS` is the length of the document that each token is in, on which dynamic and long scaling depend. So a
    document has the same frequencies in a packed row as alone. (transformers takes the longest document of the batch.)
    """
    frequencies, factor = rotary_frequencies(position, size, lengths_BS.t()[:, :, None, None])
    angles = positions_BS.t()[:, :, None, None].float() * frequencies
    if position.layout == "pairs":
        angles = angles.repeat_interleave(2, dim=-1)
    else:
        angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return (cos * factor, sin * factor) if factor != 1.0 else (cos, sin)


def depends_on_length(position: PositionConfig) -> bool:
    """Tells whether the frequencies depend on the length of documents."""
    return position.scaling is not None and position.scaling.kind in ("dynamic", "longrope")


def rotary_frequencies(position: PositionConfig, size: int, lengths_SB11: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Returns the frequencies in fp32, in radians a position, and the factor on cosines and sines.

    They are [size/2], or [S, B, 1, size/2] where they depend on the lengths of documents.
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=lengths_SB11.device) / size
    scaling = position.scaling
    if scaling is None:
        return 1.0 / position.theta**exponents, 1.0
    if scaling.kind == "dynamic":
        original = scaling.original_length or lengths_SB11
        growth = scaling.factor * (lengths_SB11 / original).clamp(min=1) - (scaling.factor - 1)
        return 1.0 / (position.theta * growth ** (size / (size - 2))) ** exponents, 1.0
    frequencies = 1.0 / position.theta**exponents
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, position.theta, size), _yarn_factor(scaling)
    return _longrope(frequencies, scaling, lengths_SB11)


def _llama3(frequencies: torch.Tensor, scaling: RopeScalingConfig) -> torch.Tensor:
    """Scales long wavelengths by the whole factor, keeps short ones, and goes smoothly from one to the other."""
    original, low, high = scaling.original_length, scaling.low_freq_factor, scaling.high_freq_factor
    assert original and low and high
    rotations = original * frequencies / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: torch.Tensor, scaling: RopeScalingConfig, theta: float, size: int) -> torch.Tensor:
    """Scales dimensions of few rotations by the whole factor, keeps those of many, with a ramp between them."""
    original = scaling.original_length
    assert original

    def dimension(rotations: float) -> float:
        """Dimension whose frequency turns so many times within the original context."""
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast or 32.0), dimension(scaling.beta_slow or 1.0)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # no division by zero
    steps = torch.arange(size // 2, dtype=torch.float32, device=frequencies.device)
    scaled = ((steps - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * scaled + frequencies * (1 - scaled)


def _yarn_factor(scaling: RopeScalingConfig) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Returns by how much vectors grow when the context grows by `factor` (Peng et al. 2023, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(
    frequencies: torch.Tensor, scaling: RopeScalingConfig, lengths_SB11: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Divides each frequency by its own number, another one in documents longer than the original context."""
    original = scaling.original_length
    assert original
    factor = scaling.attention_factor
    if factor is None:
        factor = 1.0 if scaling.factor <= 1 else math.sqrt(1 + math.log(scaling.factor) / math.log(original))
    short, long = (
        frequencies / torch.tensor(divisors, dtype=torch.float32, device=frequencies.device)
        for divisors in (scaling.short_factor, scaling.long_factor)
    )
    return torch.where(lengths_SB11 > original, long, short), factor


def rotate(x_SBND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: bool = False) -> torch.Tensor:
    """Rotates every pair (x_i, x_{i+d/2}), or with `pairs` (x_2i, x_2i+1), of the first d elements by its angle.

    d is the size of `cos` and `sin`; the other elements of a head stay as they are.
    """
    cos, sin = cos.to(x_SBND.dtype), sin.to(x_SBND.dtype)
    turned = cos.shape[-1]
    if turned < x_SBND.shape[-1]:
        first, rest = x_SBND.split((turned, x_SBND.shape[-1] - turned), dim=-1)
        return torch.cat((rotate(first, cos, sin, pairs), rest), dim=-1)
    if pairs:
        even, odd = x_SBND.unflatten(-1, (-1, 2)).unbind(-1)
        return x_SBND * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin
    if not torch.compiler.is_compiling():
        return _Rotated.apply(x_SBND, cos, sin) if torch.is_grad_enabled() else _turned(x_SBND, cos, sin, 1.0)
    first, second = x_SBND.chunk(2, dim=-1)
    return x_SBND * cos + torch.cat((-second, first), dim=-1) * sin


class _Rotated(torch.autograd.Function):
    """Computes what `rotate` does with halves; the gradient is rotated back."""

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
    if way == 1.0 and (found := elementwise.rotate_halves(x, cos, sin)) is not None:
        return found
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for x_part, y_part, cos_part, sin_part in in_parts(x, y, cos, sin):
        torch.mul(x_part, cos_part, out=y_part)
        for own, other, sin_half, sign in zip(
            y_part.chunk(2, -1), reversed(x_part.chunk(2, -1)), sin_part.chunk(2, -1), (-way, way), strict=True
        ):
            own.addcmul_(other, sin_half, value=sign)
    return y
