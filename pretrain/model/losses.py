"""Losses as functions of each label's log-probability, or of the values of a scalar head.

A loss function gives a value per token. `head_loss` weighs it by `batch.loss_mask`, and the engine divides the sum over
the whole global batch by the sum of that mask: never a mean of means.
"""

from typing import Protocol

import torch

from pretrain.model.batch import Batch


class LossFunction(Protocol):
    """Function that gives a loss per token [B, S], and tensors [B, S] by the names in `metrics` to log the means of.

    It takes log-probabilities [B, S]; for a model with a scalar head, values [B, S], or [B, S, K] where the head has K
    outputs. They are 0 where the loss mask is: nothing is computed there.
    """

    metrics: tuple[str, ...]
    temperature: float  # logits are divided by it before the softmax; a scalar head has none
    is_linear: bool  # whether the loss is a linear function of the log-probabilities; see `head_loss`

    def __call__(self, outputs: torch.Tensor, batch: Batch, /) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


class NextToken:
    """Cross entropy of the next token, for pretraining, and for SFT with a mask that selects the answers."""

    metrics: tuple[str, ...] = ()
    temperature = 1.0
    is_linear = True

    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -logprobs_BS, {}


class SquaredValues:
    """Mean square of a scalar head's distance to one, with which proofs and tests train such models."""

    metrics: tuple[str, ...] = ()
    temperature = 1.0
    is_linear = False

    def __call__(self, values: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        squared = (values - 1).square()
        return squared if squared.ndim == 2 else squared.sum(-1), {}
