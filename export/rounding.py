"""Compares outputs of Trivium's decoder with those of the reloaded model, as far as rounding in fp32 allows.

Both compute in fp32 and add in another order. Most models round their logits by less than 1e-4. A trained model whose
hidden state has a few elements of tens of thousands, as many have, rounds by more, in any implementation. How much is
measured: Trivium's decoder computes the same in fp64.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from configs.model import ModelConfig
from export.conversion.table import Family
from export.conversion.walk import embedding_name
from export.reloading import Reference, Reloaded
from pretrain.model import Decoder

MARGIN = 8.0  # of the rounding that was measured, since that of another order of additions may be larger


def outputs_of(decoder: Decoder, tokens: torch.Tensor, wanted: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the logits, or the values, of one row of tokens; at the positions `wanted` alone if they are given."""
    return decoder(tokens, torch.arange(tokens.shape[1])[None].expand_as(tokens), wanted=wanted)


def in_fp64(decoder: Decoder) -> Decoder:
    """Returns a copy of the decoder that computes all but the rotary angles in fp64."""
    return copy.deepcopy(decoder).double()


def allowed(ours: torch.Tensor, exact: torch.Tensor, tolerance: float) -> float:
    """Returns the largest difference from `ours` that rounding explains, where `exact` is the same in fp64.

    That is `tolerance`, or more if `ours` has a larger error itself; but never more than `tolerance` times the largest
    element, since a rounding that lets a token choose another expert says nothing about other implementations.
    """
    error, largest = (values.abs().max().item() for values in (ours - exact, exact))
    return max(tolerance, min(MARGIN * error, tolerance * largest))


def first_layer(hf: Reloaded, reference: Reference, tokens: torch.Tensor, tolerance: float) -> str:
    """Returns the first module whose output differs by more than is allowed, and by how much, as text."""
    decoder, exact = reference.decoder, in_fp64(reference.decoder)
    modules = module_names(reference.family, reference.compared)
    theirs = _recorded({n: hf.model.get_submodule(module) for n, module in modules.items()}, lambda: hf.model(tokens))
    ours, wide = (
        _recorded({name: _module(one, name) for name in modules}, partial(outputs_of, one, tokens))
        for one in (decoder, exact)
    )
    for name, found in ours.items():
        mine = found.transpose(0, 1)
        difference = (mine - theirs[name]).abs().max().item()
        if not difference < allowed(mine, wide[name].transpose(0, 1), tolerance):
            return f"first at the output of {name}, by {difference:.3g}"
    return f"{'lm_head' if reference.config.has_logits else 'value_head'}, all layers before it agree"


def _module(decoder: Decoder, name: str) -> torch.nn.Module:
    found: torch.nn.Module = decoder.get_submodule(name)
    return found


def _recorded(modules: dict[str, Any], run: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Returns the output of each module in a run, by its name in `modules` and in their order."""
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def record(module: Any, args: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in modules}


def module_names(family: Family, config: ModelConfig) -> dict[str, str]:
    """Returns the names in transformers of the modules whose outputs can be compared, by Trivium's names, in order."""
    found = {} if config.scale_embedding else {"embedding": embedding_name(family).removesuffix(".weight")}
    layers = next(name for rule in family.rules for name in rule.their_names if "{layer}" in name).partition(".{layer}")
    found |= {f"layers.{layer}": f"{layers[0]}.{layer}" for layer in range(config.num_layers)}
    final = [rule.their_names[0] for rule in family.rules if "final_norm.weight" in rule.our_names]
    return found | ({"final_norm": final[0].removesuffix(".weight")} if config.norm.final and final else {})
