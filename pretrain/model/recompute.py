"""Activations that are not kept but computed again in the backward pass (Chen et al. 2016)."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
    """`function(*inputs)`, of which only the inputs are kept."""
    return checkpoint(function, *inputs, use_reentrant=False)


def is_recomputing() -> bool:
    """True while a backward pass computes activations again: what is counted in forward is counted already."""
    return torch._C._current_autograd_node() is not None
