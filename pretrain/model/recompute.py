"""Recomputes activations in the backward pass instead of storing them (Chen et al. 2016)."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
    """Calls `function(*inputs)` and stores the inputs alone; the backward pass calls it again."""
    # Nothing in the model draws from the global random state, so none is kept.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def is_recomputing() -> bool:
    """Whether a backward pass computes activations again now, so that code must not count a second time."""
    return torch._C._current_autograd_node() is not None
