"""Prompt tuning (Lester et al. 2021) and P-tuning (Liu et al. 2021): trained vectors before the embeddings of a text.

Prompt tuning trains the vectors P [n, H] themselves. P-tuning trains P and an encoder that makes the vectors from it,
either an MLP, h = W_3 relu(W_2 relu(W_1 p)), or a bidirectional LSTM of two layers over the n vectors, whose outputs go
through W_2 relu(W_1 ·). Encoders have the sizes that PEFT gives them.

Every rank of the first pipeline stage has all of it, and computes the same gradient.
"""

import torch
from torch import nn

from configs.adapters import AdapterConfig
from pretrain.model.adapters.parameters import new_parameter
from pretrain.model.layer_context import LayerContext
from pretrain.model.slices import Marks, mark

LSTM_LAYERS = 2


class PromptVectors(nn.Module):
    """The vectors of virtual tokens [n, H], which begin with the deviation of the model's own initial weights."""

    def __init__(self, hidden_size: int, config: AdapterConfig, context: LayerContext):
        super().__init__()
        self.embedding = new_parameter(context, (config.virtual_tokens, hidden_size), Marks())
        self.encoder: nn.Module = nn.Identity()
        if config.kind == "p_tuning":
            encoder = MLPEncoder if config.encoder == "mlp" else LSTMEncoder
            self.encoder = encoder(hidden_size, config.encoder_size, context)

    def forward(self, rows: int) -> torch.Tensor:
        """Returns the virtual tokens' vectors, repeated for each of `rows` rows: [n, rows, H]."""
        return self.vectors()[:, None].expand(-1, rows, -1)

    def vectors(self) -> torch.Tensor:
        """Returns the vectors [n, H] that stand in place of the virtual tokens' embeddings."""
        return self.encoder(self.embedding)


class MLPEncoder(nn.Module):
    """Three linear layers with two ReLUs between them, vector by vector."""

    def __init__(self, hidden_size: int, size: int, context: LayerContext):
        super().__init__()
        sizes = ((hidden_size, size), (size, size), (size, hidden_size))
        self.layers = nn.ModuleList(linear(size_in, size_out, context) for size_in, size_out in sizes)

    def forward(self, x_NH: torch.Tensor) -> torch.Tensor:
        first, second, last = self.layers
        return last(torch.relu(second(torch.relu(first(x_NH)))))


class LSTMEncoder(nn.Module):
    """A bidirectional LSTM over the vectors, and two linear layers of its outputs with a ReLU between them."""

    def __init__(self, hidden_size: int, size: int, context: LayerContext):
        super().__init__()
        factory = {"dtype": context.dtype, "device": context.device}
        self.lstm = nn.LSTM(hidden_size, size, LSTM_LAYERS, bidirectional=True, **factory)
        for name, parameter in self.lstm.named_parameters():
            marks = Marks(constant=0.0, decays=False) if name.startswith("bias") else Marks(std=_std(size))
            mark(parameter, marks)
        self.layers = nn.ModuleList((linear(2 * size, 2 * size, context), linear(2 * size, hidden_size, context)))

    def forward(self, x_NH: torch.Tensor) -> torch.Tensor:
        first, last = self.layers
        return last(torch.relu(first(self.lstm(x_NH)[0])))


def linear(size_in: int, size_out: int, context: LayerContext, on_every_stage: bool = False) -> nn.Linear:
    """Makes a linear layer that every rank has whole, with weights of the deviation that PyTorch gives them."""
    layer = nn.Linear(size_in, size_out, dtype=context.dtype, device=context.device)
    weight, bias = layer.parameters()
    mark(weight, Marks(std=_std(size_in), on_every_stage=on_every_stage))
    mark(bias, Marks(constant=0.0, decays=False, on_every_stage=on_every_stage))
    return layer


def _std(size_in: int) -> float:
    """Returns the deviation of values drawn uniformly up to 1 / sqrt(size_in)."""
    return float((3 * size_in) ** -0.5)
