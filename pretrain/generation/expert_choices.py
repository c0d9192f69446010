"""The experts that routers choose while texts are sampled, which training on those texts can choose again.

Sampler and trainer round differently, and updates change the router itself. A token may then go to another expert than
the one its text was sampled with, and its log-probability jumps. With the sampler's choices replayed, log-probabilities
differ by rounding alone (Ma et al. 2025, rollout routing replay). L layers with a mixture of experts, k choices each.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from pretrain.model.moe.router import Router


class Routed(Protocol):
    """Model that lists its routers, in the order of its layers."""

    @property
    def routers(self) -> list[Router]: ...


def choices_shape(model: Routed) -> tuple[int, int]:
    """Returns (L, k): the layers with a mixture of experts, and the choices of each for a token."""
    routers = model.routers
    return len(routers), routers[0].moe.top_k if routers else 0


class RouterLog:
    """Context manager that keeps the choices of routers in the passes within it."""

    def __init__(self, routers: Sequence[Router]) -> None:
        self._found: dict[int, torch.Tensor] = {}
        self._hooks = [router.register_forward_hook(partial(self._keep, i)) for i, router in enumerate(routers)]

    def __enter__(self) -> "RouterLog":
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, layer: int, router: Router, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        self._found[layer] = output[1]

    def taken(self, shape: Sequence[int]) -> np.ndarray:
        """Returns int16 [B, S, L, k] of the last pass, over tokens of `shape` [B, S]; virtual ones are left out."""
        rows, length = shape
        choices = [self._found.pop(layer).to(torch.int16) for layer in range(len(self._hooks))]
        stacked_SBLK = torch.stack(choices, 1).unflatten(0, (-1, rows))[-length:]
        return stacked_SBLK.transpose(0, 1).cpu().numpy()
