"""Freezes weights: they have no gradient, no state in the optimizer, and no part in the gradient norm."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from configs.adapters import AdapterConfig
from configs.loader import ConfigError
from configs.model import ModelConfig
from pretrain import megatron
from pretrain.model import Decoder, LayerContext, value_head
from pretrain.model.adapters import add_adapters, is_adapter
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage


def freeze(stage: PipelineStage, patterns: Sequence[str], mesh: Mesh, has_adapters: bool) -> None:
    """Freezes the weights whose global names match one of `patterns`, and with adapters all but the adapters.

    A scalar head is trained beside adapters: it has no pretrained values.

    The model may have adapters on other stages than this one. In a pattern * stands for any text. Raises ConfigError,
    on all ranks, if a pattern matches no weight of the model or nothing is left to train; collective if there are
    patterns.
    """
    named = list(stage.named_global_parameters())
    if not patterns and not has_adapters:
        return
    if patterns:
        check_patterns({name: None for own in mesh.gather_json([name for name, _ in named]) for name in own}, patterns)
    for name, parameter in named:
        is_base = has_adapters and not is_adapter(name) and name != value_head.NAME
        if is_base or any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    for chunk in stage.chunks:
        chunk.is_partly_frozen = True


def names_of_weights(model: ModelConfig, adapter: AdapterConfig | None) -> list[str]:
    """Returns the global names of a model's weights and of its adapters', without memory for them.

    Raises ConfigError if the model lacks layers that the adapters are for.
    """
    context = LayerContext(device=torch.device("meta"))
    megatron.redirect_to(context.device)
    try:
        decoder = Decoder(model, context=context)
        if adapter is not None:
            add_adapters(decoder, adapter.model_copy(update={"base": "full"}), context)
    finally:
        megatron.redirect_to_cpu()
    return [name for name, _ in decoder.named_global_parameters()]


def check_patterns(names: dict[str, None], patterns: Sequence[str]) -> None:
    """Raises ConfigError if a pattern matches none of the names of a model's weights, or all are frozen."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"train.freeze names {pattern!r}, which matches no weight of the model; names are like "
                f"{', '.join(list(names)[:3])}, and * stands for any text"
            )
    if all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in names):
        raise ConfigError(f"train.freeze = {list(patterns)} matches every weight, and nothing is left to train")
