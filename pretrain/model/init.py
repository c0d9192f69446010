"""Initial weights: each parameter drawn whole from a generator keyed by (seed, its global name, expert), then sliced.

So a layout never changes the initial weights. Normal with `init_std`, scaled by 1/sqrt(2 * num_layers) where a block
writes into the residual stream (GPT-2, Radford et al. 2019); norm weights are one.
"""

import hashlib
import math

import torch
from torch import nn

from pretrain.model.decoder import Decoder


def init_weights(model: Decoder, seed: int, tp: int = 1, tp_rank: int = 0) -> None:
    """Fills every parameter in place. `tp_rank` picks this rank's slice of split ones."""
    config = model.model_config
    with torch.no_grad():
        for name, parameter in model.named_global_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            std = config.init_std
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                std /= math.sqrt(2 * config.num_layers)
            shape = global_shape(parameter, tp)
            if ".experts." in name:
                whole = torch.stack([_draw(seed, f"{name}#{e}", shape[1:], std) for e in range(shape[0])])
            else:
                whole = _draw(seed, name, shape, std)
            parameter.copy_(tp_slice(whole, parameter, tp, tp_rank))


def _draw(seed: int, key: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator) * std


def split_dim(parameter: nn.Parameter) -> int | None:
    """The dimension that tensor parallel splits, or None where each rank holds all of it."""
    return getattr(parameter, "partition_dim") if getattr(parameter, "tensor_model_parallel", False) else None  # noqa: B009


def global_shape(parameter: nn.Parameter, tp: int) -> tuple[int, ...]:
    shape, dim = list(parameter.shape), split_dim(parameter)
    if dim is not None:
        shape[dim] *= tp
    return tuple(shape)


def tp_slice(whole: torch.Tensor, parameter: nn.Parameter, tp: int, tp_rank: int) -> torch.Tensor:
    dim = split_dim(parameter)
    return whole if dim is None else whole.chunk(tp, dim)[tp_rank]
