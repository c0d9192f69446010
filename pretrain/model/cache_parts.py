"""Elementwise work in parts that a CPU's cache holds, so that several passes over them read memory once."""

from collections.abc import Iterator

import torch

ELEMENTS = 2**17  # of a tensor in a part: half a megabyte in fp32, and enough for several threads


def in_parts(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields views of the same rows of all tensors, whose first dimensions are equal; on a GPU all rows at once."""
    first = tensors[0]
    if first.numel() <= ELEMENTS or first.device.type != "cpu":
        return iter((tensors,))
    rows = ELEMENTS * len(first) // first.numel()
    return zip(*(tensor.split(max(1, rows)) for tensor in tensors), strict=True)
