"""Aggregation of token losses to the loss of a global step, independent of micro-batches and ranks.

The trainer divides the weighted sum of a global step's token losses by the sum of the weights, and never averages
averages. An aggregation is therefore each token's weight and one factor for the whole step.
"""

from enum import StrEnum

import torch
from torch import Tensor

from posttrain.algorithms.token_batch import TokenBatch


class Aggregation(StrEnum):
    """Way of averaging the losses of completions."""

    TOKEN_MEAN = "token_mean"  # all tokens of the step have the same weight (DAPO, arXiv 2503.14476)
    SEQUENCE_MEAN = "sequence_mean"  # the mean of each completion's own mean (GRPO, arXiv 2402.03300)
    FIXED_LENGTH = "fixed_length"  # sum / (completions * longest allowed): no length bias (Dr.GRPO, 2503.20783)


def token_weight(length: int, aggregation: Aggregation) -> float:
    """Returns the weight of each token of a completion of `length` tokens, its end token included."""
    return 1.0 / length if aggregation == Aggregation.SEQUENCE_MEAN else 1.0


def step_factor(tokens: int, completions: int, max_length: int, aggregation: Aggregation) -> float:
    """Returns the factor on the weighted mean of a step's token losses.

    `tokens` and `completions` are totals of the global step; `max_length` is the longest completion allowed, in tokens.
    """
    if aggregation != Aggregation.FIXED_LENGTH or completions == 0:
        return 1.0
    return tokens / (completions * max_length)


def aggregate(loss: Tensor, batch: TokenBatch, aggregation: Aggregation, max_length: int) -> Tensor:
    """Returns the loss of a step that is all in one batch, from the losses of its tokens [B, S].

    It is what the trainer computes from `token_weight` and `step_factor` over micro-batches and ranks.
    """
    loss = torch.where(batch.mask, loss, 0.0)
    match Aggregation(aggregation):
        case Aggregation.TOKEN_MEAN:
            return loss.sum() / batch.mask.sum().clamp(min=1)
        case Aggregation.SEQUENCE_MEAN:
            return (loss / batch.lengths().clamp(min=1)).sum() / batch.num_sequences().clamp(min=1)
        case Aggregation.FIXED_LENGTH:
            return loss.sum() / (batch.num_sequences().clamp(min=1) * max_length)
