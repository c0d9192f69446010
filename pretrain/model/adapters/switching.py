"""Turns adapters off for a while, so that a model computes what its base does; no second copy of weights is needed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from pretrain.model.context import NO_TOKENS
from pretrain.model.decoder import Decoder


@contextmanager
def adapters_off(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context manager that switches off the adapters of all layers within `modules` (submodules named `adapter`).

    A layer whose `adapter` is None or empty computes what it does without one. Parameters stay where they are, and must
    not be trained meanwhile. A base in 4 bits stays so.
    """
    modules = list(modules)
    virtual = [(module, module.virtual) for module in modules if isinstance(module, Decoder)]
    layers = [layer for module in modules for layer in module.modules()]
    held = [(layer, adapter) for layer in layers if (adapter := layer._modules.get("adapter")) is not None]
    for layer, adapter in held:
        layer._modules["adapter"] = nn.ModuleDict() if isinstance(adapter, nn.ModuleDict) else None
    for decoder, _ in virtual:
        decoder.virtual = NO_TOKENS
    try:
        yield
    finally:
        for layer, adapter in held:
            layer._modules["adapter"] = adapter
        for decoder, tokens in virtual:
            decoder.virtual = tokens
