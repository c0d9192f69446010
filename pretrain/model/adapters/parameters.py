"""Makes the parameters of adapters that belong to no single weight of the model."""

import torch
from torch import nn

from pretrain.model.layer_context import LayerContext
from pretrain.model.slices import Marks, mark


def new_parameter(context: LayerContext, shape: tuple[int, ...], marks: Marks) -> nn.Parameter:
    """Makes a parameter in the precision and on the device of the layers; its values are drawn later, by its marks."""
    parameter = nn.Parameter(torch.empty(shape, dtype=context.dtype, device=context.device))
    mark(parameter, marks)
    return parameter
