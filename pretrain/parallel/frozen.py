"""Freezes weights: they have no gradient, no state in the optimizer, and no part in the gradient norm."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from configs.loader import ConfigError
from pretrain.model import value_head
from pretrain.model.adapters import is_adapter
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
