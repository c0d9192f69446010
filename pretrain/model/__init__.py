"""The decoder and its parts. The files here know shapes and layers, never ranks."""

from pretrain.model.decoder import Decoder, StageSpec
from pretrain.model.initial_weights import build_single, init_weights, load_weights
from pretrain.model.layer_context import LayerContext
from pretrain.model.slices import Slices

__all__ = ["Decoder", "LayerContext", "Slices", "StageSpec", "build_single", "init_weights", "load_weights"]
