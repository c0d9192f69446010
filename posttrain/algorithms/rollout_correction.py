"""Weights for tokens whose sampler and trainer disagree on their probability, although both have the same weights.

The weight is exp(trainer's log-probability - sampler's), of the policy before its first update on the rollout. It can
be truncated, or tokens out of bounds can be masked, or it is reported only. The loss is multiplied by it.
"""

from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.algorithms.policy import LARGEST_LOG_RATIO
from posttrain.algorithms.token_batch import TokenBatch


class Correction(StrEnum):
    """Use of the weights: to report them only, to truncate them, or to mask tokens whose weight is out of bounds."""

    REPORT = "report"  # measured, and the loss stays as it is
    TRUNCATE = "truncate"  # limited to the bounds (truncated importance sampling, Yao et al. 2025)
    MASK = "mask"  # kept inside the bounds, and 0 outside (IcePop; verl's and NeMo-RL's masked importance sampling)


class Level(StrEnum):
    """Tokens over which one weight is taken: each token by itself, or the product or geometric mean over a sequence."""

    TOKEN = "token"
    SEQUENCE = "sequence"  # the product over the tokens of a sequence, for losses with a ratio per sequence
    GEOMETRIC = "geometric"  # the geometric mean over the tokens of a sequence


class RolloutWeights(NamedTuple):
    """Factors on the loss, the weights as measured, and where these are out of bounds (bool); all are [B, S]."""

    factor: Tensor
    measured: Tensor
    out_of_bounds: Tensor


def rollout_weights(
    batch: TokenBatch,
    correction: Correction = Correction.TRUNCATE,
    level: Level = Level.TOKEN,
    low: float = 0.0,
    high: float = float("inf"),
    bounds_of: Level | None = None,
) -> RolloutWeights:
    """Returns the weights of tokens, without gradient; 1 outside the mask.

    Bounds are of the weights at `level`, or at the level `bounds_of`: masking whole sequences by their geometric mean,
    with weights per token inside them, is level "token", bounds_of "geometric". A log-probability that is not finite
    counts as the largest difference there may be. Raises ValueError if the bounds are in the wrong order.
    """
    if low > high:
        raise ValueError(f"the lower bound of rollout weights, {low}, is above the upper one, {high}; swap them")
    old = batch.need("logprobs" if batch.old_logprobs is None else "old_logprobs")
    difference = (old - batch.need("rollout_logprobs")).nan_to_num(0.0, LARGEST_LOG_RATIO, -LARGEST_LOG_RATIO)
    weights = _weights(batch, difference, Level(level))
    bounded = weights if bounds_of is None else _weights(batch, difference, Level(bounds_of))
    outside = batch.mask & ((bounded < low) | (bounded > high))
    match Correction(correction):
        case Correction.REPORT:
            factor = torch.ones_like(weights)
        case Correction.TRUNCATE:
            factor = weights.clamp(low, high)
        case Correction.MASK:
            factor = torch.where(outside, 0.0, weights)
    return RolloutWeights(torch.where(batch.mask, factor, 1.0), weights, outside)


def _weights(batch: TokenBatch, difference: Tensor, level: Level) -> Tensor:
    match level:
        case Level.SEQUENCE:
            difference = batch.sequence_sum(difference)
        case Level.GEOMETRIC:
            difference = batch.sequence_mean(difference)
    return torch.where(batch.mask, difference.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp(), 1.0)
