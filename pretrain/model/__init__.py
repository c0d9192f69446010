"""The decoder and its parts. The files here know shapes and layers, never ranks."""

import torch

from configs.model import ModelConfig
from pretrain.model.decoder import Decoder, StageSpec
from pretrain.model.init import init_weights
from pretrain.model.layer_context import LayerContext
from pretrain.model.slices import Slices

__all__ = ["Decoder", "LayerContext", "Slices", "StageSpec", "build_single", "init_weights"]


def build_single(config: ModelConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> Decoder:
    """Builds the whole model in one process, in eval mode and without process groups.

    `weights` maps global names to whole tensors. Raises ValueError where a name is missing, unknown or misshapen.
    """
    model = Decoder(config, context=LayerContext(dtype=dtype))
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
