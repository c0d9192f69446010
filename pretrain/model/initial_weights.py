"""Draws a model's initial weights, and fills a model with given ones.

Each parameter is drawn whole from a generator keyed by (seed, its global name, expert), and then sliced; therefore a
layout never changes the initial weights. What is drawn is in the parameter's `Marks`: a constant, logarithms of numbers
in a range, or normal values, with a smaller deviation where a block adds to the residual stream (GPT-2, Radford et al.
2019).
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from configs.adapters import AdapterConfig
from configs.model import ModelConfig
from pretrain.model.adapters import add_adapters
from pretrain.model.adapters.quantized_base import quantized_weights
from pretrain.model.decoder import Decoder
from pretrain.model.layer_context import LayerContext
from pretrain.model.slices import WHOLE, Slices, marks_of

Drawing = Callable[[nn.Parameter], AbstractContextManager[Any]]


def init_weights(model: Decoder, seed: int, slices: Slices = WHOLE, drawing: Drawing = nullcontext) -> None:
    """Fills every parameter in place with the slice that this rank holds, each within a context `drawing(parameter)`.

    ZeRO stage 3 passes a context that splits the parameter at its end. Parameters on the meta device have no values and
    are left as they are.
    """
    with torch.no_grad():
        for name, parameter in model.named_global_parameters():
            if parameter.is_meta:
                continue
            with drawing(parameter):
                _fill(model, name, parameter, seed, slices)
        for name, quantized in quantized_weights(model):
            std, shape = (
                model.model_config.init_std * quantized.marks.std_factor,
                slices.global_shape(quantized.outline),
            )
            has_values = quantized.device.type != "meta"
            whole = _draw(seed, name, shape, std) if has_values else torch.empty(shape, device="meta")
            quantized.fill(whole, slices)


def _fill(model: Decoder, name: str, parameter: nn.Parameter, seed: int, slices: Slices) -> None:
    marks = marks_of(parameter)
    if marks.constant is not None:
        parameter.fill_(marks.constant)
        return
    std = model.model_config.init_std * marks.std_factor if marks.std is None else marks.std
    shape = slices.global_shape(parameter)
    if marks.log_of is not None:
        low, high = marks.log_of
        even = torch.rand(shape, generator=_generator(seed, name))
        parameter.copy_(slices.cut((low + (high - low) * even).log(), parameter))
        return
    if not marks.is_expert:
        parameter.copy_(slices.cut(_draw(seed, name, shape, std), parameter))
        return
    first, of_one_expert = slices.offset(parameter)[0], replace(slices, ep=1, ep_rank=0)
    for index, own in enumerate(parameter.split(1)):
        expert = _draw(seed, f"{name}#{first + index}", shape[1:], std)[None]
        own.copy_(of_one_expert.cut(expert, parameter))


def _draw(seed: int, key: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(seed, key)) * std


def _generator(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def build_single(
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    adapter: AdapterConfig | None = None,
) -> Decoder:
    """Builds the whole model in one process, in eval mode and without process groups.

    `weights` maps global names to whole tensors, those of adapters that are not merged among them. Raises ValueError
    where a name is missing, unknown or misshapen.
    """
    context = LayerContext(dtype=dtype)
    model = Decoder(config, context=context)
    if adapter is not None:
        add_adapters(model, adapter, context)
    load_weights(model, weights)
    return model.eval()


def load_weights(model: Decoder, weights: dict[str, torch.Tensor]) -> None:
    """Copies whole tensors into a model that is not split; raises ValueError as `build_single` does."""
    parameters: dict[str, torch.Tensor] = {**dict(model.named_global_parameters()), **model.named_balance()}
    missing, unknown = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    if missing or unknown:
        raise ValueError(
            f"the weights are of another model: missing {missing[:3] or 'none'}, unknown {unknown[:3] or 'none'}; "
            "build it from the config that was saved with them"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise ValueError(
                    f"{name} is {tuple(weights[name].shape)} in the weights, {tuple(parameter.shape)} in the model"
                )
            parameter.copy_(weights[name])
