"""Initial weights: each parameter drawn whole from a generator keyed by (seed, its global name, expert), then sliced.

Therefore a layout never changes the initial weights. They are normal with `init_std`, scaled by
1/sqrt(2 * num_layers) where a block adds to the residual stream (GPT-2, Radford et al. 2019); norm weights are one.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pretrain.model.decoder import Decoder
from pretrain.model.slices import WHOLE, Slices, is_expert

Drawing = Callable[[nn.Parameter], AbstractContextManager[Any]]


def init_weights(model: Decoder, seed: int, slices: Slices = WHOLE, drawing: Drawing = nullcontext) -> None:
    """Fills every parameter in place with the slice that this rank holds, each within a context `drawing(parameter)`.

    ZeRO stage 3 passes a context that splits the parameter at its end.
    """
    with torch.no_grad():
        for name, parameter in model.named_global_parameters():
            with drawing(parameter):
                _fill(model, name, parameter, seed, slices)


def _fill(model: Decoder, name: str, parameter: nn.Parameter, seed: int, slices: Slices) -> None:
    if name.endswith("norm.weight"):
        parameter.fill_(1.0)
        return
    config = model.model_config
    std = config.init_std
    if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
        std /= math.sqrt(2 * config.num_layers)
    shape = slices.global_shape(parameter)
    if not is_expert(parameter):
        parameter.copy_(slices.cut(_draw(seed, name, shape, std), parameter))
        return
    first, of_one_expert = slices.offset(parameter)[0], replace(slices, ep=1, ep_rank=0)
    for index, own in enumerate(parameter.split(1)):
        expert = _draw(seed, f"{name}#{first + index}", shape[1:], std)[None]
        own.copy_(of_one_expert.cut(expert, parameter))


def _draw(seed: int, key: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator) * std
