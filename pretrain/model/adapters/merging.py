"""Merges adapters into the weights that they adapt, as whole tensors by global name.

The base's tensors are not changed, so that they are the unmerged model, bit for bit.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from configs.adapters import AdapterConfig

MARK = ".adapter."


def is_adapter(name: str) -> bool:
    """Returns whether a global name is a parameter of an adapter."""
    return MARK in f".{name}"


STATE = ("_sensitivity", "_uncertainty", ".kept")  # end the names of AdaLoRA's numbers


def is_state(name: str) -> bool:
    """Returns whether a global name is a number of AdaLoRA's schedule, which the model's output does not depend on."""
    return is_adapter(name) and name.endswith(STATE)


def is_part(name: str) -> bool:
    """Returns whether a global name is a weight of an adapter, which the model's output depends on."""
    return is_adapter(name) and not is_state(name)


def target_of(name: str) -> str:
    """Returns the global name of the weight that the adapter's parameter `name` belongs to.

    `layers.0.attention.q_proj.adapter.a` belongs to `layers.0.attention.q_proj.weight`, and
    `layers.0.moe.experts.adapter.up_proj.a` to `layers.0.moe.experts.up_proj`.
    """
    module, _, rest = name.partition(MARK)
    inner, _, _ = rest.rpartition(".")
    return f"{module}.{inner}" if inner else f"{module}.weight"


def adapter_name(target: str, part: str) -> str:
    """Returns the global name of a part, such as "a", of the adapter of a weight; the inverse of `target_of`."""
    module, _, leaf = target.rpartition(".")
    return f"{module}{MARK}{part}" if leaf == "weight" else f"{module}{MARK}{leaf}.{part}"


def parts_by_target(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the tensors of adapters by the name of the weight that they adapt, and the name of the part."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in filter(is_part, tensors):
        found.setdefault(target_of(name), {})[name.rpartition(".")[2]] = tensors[name]
    return found


def merged(
    names: list[str], read: Callable[[str], torch.Tensor], config: AdapterConfig
) -> dict[str, Callable[[], torch.Tensor]]:
    """Returns a function for each adapted weight that reads and merges it, in fp32 and then in the weight's precision.

    There are none where this kind of adapter stays beside the weights. `names` are those of the adapters' parameters;
    `read` reads a whole tensor by its global name.
    """
    if not config.merges:
        return {}
    by_target: dict[str, dict[str, str]] = {}
    for name in filter(is_part, names):
        by_target.setdefault(target_of(name), {})[name.rpartition(".")[2]] = name

    def merge(target: str) -> torch.Tensor:
        weight = read(target)
        parts = {part: read(name) for part, name in by_target[target].items()}
        return merged_weight(weight, parts, config.scale)

    return {target: partial(merge, target) for target in by_target}


def merged_weight(weight: torch.Tensor, parts: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """Returns W + s B A, or W + s P diag(l) Q; with rows of DoRA's lengths if there is a magnitude.

    Experts are stacked [E, out, in].
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    base, a, b = (tensor.to(wide) for tensor in (weight, parts["a"], parts["b"]))
    if "lambdas" in parts:
        b = b * parts["lambdas"].to(wide)
    whole = base + scale * (b @ a)
    if "magnitude" in parts:
        ratio = (base.square().sum(1) / whole.square().sum(1)).sqrt()
        whole = whole * (parts["magnitude"].to(wide) * ratio)[:, None]
    return whole.to(weight.dtype)
