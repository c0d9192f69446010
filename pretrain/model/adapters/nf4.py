"""NF4 with double quantisation (QLoRA, Dettmers et al. 2023): a tensor in 4 bits and a little more an element.

The elements of a tensor, row after row, are taken in blocks of 64. Each is divided by the largest absolute value of its
block, and becomes the number of the nearest of 16 levels, which divide a normal distribution evenly (section 3). The
blocks' largest values, less their mean, are quantised in turn: in blocks of 256, to the 256 levels of the dynamic data
type of Dettmers et al. (2022), which has 7 exponents of 10. Codes and levels are those of bitsandbytes.

Whole tensors are quantised, and a rank keeps its slice of the codes, so that a layout changes no value.
"""

from dataclasses import dataclass
from functools import cache

import torch

BLOCK, SCALE_BLOCK = 64, 256  # elements of the tensor, and scales, that share a scale
LEAST = 1e-38  # in place of a scale of zero
# The levels of NF4, appendix E.
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
EXPONENTS = 7


@cache
def dynamic_levels() -> torch.Tensor:
    """Returns the 256 levels of the dynamic data type, in order: zero, one, and midpoints below each power of 10."""
    found = [0.0, 1.0]
    for exponent in range(EXPONENTS):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - EXPONENTS + 1) * ((bounds[:-1] + bounds[1:]) / 2)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32)


@dataclass
class NF4:
    """A whole tensor in NF4: codes [elements] of 4 bits in a byte each, and what scales are made of.

    `scales` [blocks] are codes of 8 bits; a block's scale is their level times that of its `scale_blocks`, and `mean`.
    """

    shape: tuple[int, ...]
    codes: torch.Tensor
    scales: torch.Tensor
    scale_blocks: torch.Tensor
    mean: torch.Tensor

    def whole_scales(self) -> torch.Tensor:
        """Returns the scale of every block, [blocks] in fp32."""
        levels = dynamic_levels().to(self.scales.device)
        wide = self.scale_blocks.repeat_interleave(SCALE_BLOCK)[: len(self.scales)]
        return levels[self.scales.int()] * wide + self.mean

    def tensor(self) -> torch.Tensor:
        """Returns the tensor in fp32, rounded to its levels."""
        scales = self.whole_scales().repeat_interleave(BLOCK)[: len(self.codes)]
        levels = torch.tensor(LEVELS, device=self.codes.device)
        return (levels[self.codes.int()] * scales).view(self.shape)


def quantized(tensor: torch.Tensor) -> NF4:
    """Quantises a whole tensor, which is taken in fp32."""
    levels = torch.tensor(LEVELS, device=tensor.device)
    codes, scales = _nearest(tensor.float().flatten(), levels, BLOCK)
    mean = scales.mean()
    scale_codes, scale_blocks = _nearest(scales - mean, dynamic_levels().to(tensor.device), SCALE_BLOCK)
    return NF4(tuple(tensor.shape), codes, scale_codes, scale_blocks, mean)


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor rounded to the values that quantising leaves, in its own precision."""
    return quantized(tensor).tensor().to(tensor.dtype)


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Puts two codes of 4 bits into each byte, the first into the higher bits; an odd last one gets a 0 beside it."""
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    return codes[::2] << 4 | codes[1::2]


def unpacked(bytes_: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the first `count` codes that `packed` put together."""
    return torch.stack((bytes_ >> 4, bytes_ & 15), 1).flatten()[:count]


def _nearest(values: torch.Tensor, levels: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns, block by block, the number of each value's nearest level, and the block's largest absolute value."""
    filled = torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)
    largest = filled.abs().amax(1)
    # Multiplied by the inverse, as bitsandbytes does, so that values halfway between two levels go the same way.
    relative = (filled * (1.0 / largest.clamp(min=LEAST))[:, None]).clamp(-1, 1).flatten()[: len(values)]
    return torch.bucketize(relative, (levels[:-1] + levels[1:]) / 2).to(torch.uint8), largest
