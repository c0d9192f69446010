"""Policy losses per token, each a function of one batch of tokens, as in its paper.

Every function returns the loss of each token and where clipping acted. The trainer weighs tokens and averages (see
`aggregation`); a loss never divides by the number of tokens, so micro-batches and layouts cannot change it.

The sign is that of a loss: less is better. A token with a positive advantage has a negative PPO loss, and a positive
CISPO loss, as CISPO multiplies the advantage by a log-probability, which is negative. Gradients have the same sign in
all of them: on policy, the derivative by the token's log-probability is minus its advantage.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.algorithms.token_batch import TokenBatch

LARGEST_LOG_RATIO = 20.0  # e^20 is far past any bound; beyond it, products of 0 and infinity would make NaN gradients


class TokenLoss(NamedTuple):
    """A loss of each token [B, S], and bool [B, S], True where a bound took away or limited the token's gradient."""

    loss: Tensor
    clipped: Tensor


def ppo_clip(batch: TokenBatch, low: float = 0.2, high: float = 0.2, dual: float | None = None) -> TokenLoss:
    """Computes PPO's clipped surrogate: -min(ratio A, clip(ratio, 1 - low, 1 + high) A).

    Schulman et al. 2017 (arXiv 1707.06347, eq. 7). `high` above `low` is DAPO's clip-higher (arXiv 2503.14476).
    `dual` c bounds the loss by -c A where A < 0 (dual clip, Ye et al. 2020, arXiv 1912.09729, eq. 5).
    """
    return _clipped_surrogate(batch, torch.exp(log_ratio(batch)), low, high, dual)


def gspo(batch: TokenBatch, low: float = 3e-4, high: float = 4e-4, dual: float | None = None) -> TokenLoss:
    """Computes GSPO's loss: PPO's, with one ratio s = exp(mean log-ratio of the tokens) for each sequence.

    Zheng et al. 2025 (arXiv 2507.18071, eq. 5 and 14). Each token's gradient is s times that of its own
    log-probability: s enters as stop-gradient(s) * policy / stop-gradient(policy). Bounds are those of the paper.
    """
    s = batch.sequence_mean(log_ratio(batch)).detach()
    logprobs = batch.inside(batch.logprobs)
    ratio = torch.exp(s + logprobs - logprobs.detach())
    return _clipped_surrogate(batch, ratio, low, high, dual)


def cispo(batch: TokenBatch, lowest: float = 0.0, highest: float = 5.0) -> TokenLoss:
    """Computes CISPO's loss: -stop-gradient(clip(ratio, lowest, highest)) A log policy.

    MiniMax-M1 (arXiv 2506.13585, eq. 4). The bounds are of the ratio itself, not distances from 1. No token loses its
    gradient; past a bound it is limited. The loss of a token with A > 0 is positive, see the module.
    """
    ratio = torch.exp(log_ratio(batch)).detach()
    loss = -ratio.clamp(lowest, highest) * batch.need("advantages") * batch.inside(batch.logprobs)
    return TokenLoss(loss, batch.mask & ((ratio < lowest) | (ratio > highest)))


def log_ratio(batch: TokenBatch) -> Tensor:
    """Returns log(policy / old policy) per token, 0 outside the mask.

    Without old log-probabilities the policy itself, without gradient, takes their place: the ratio is 1.
    """
    old = batch.need("logprobs" if batch.old_logprobs is None else "old_logprobs")
    return (batch.inside(batch.logprobs) - old).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def _clipped_surrogate(batch: TokenBatch, ratio: Tensor, low: float, high: float, dual: float | None) -> TokenLoss:
    advantages = batch.need("advantages")
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    clipped = ((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low))
    if dual is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual * advantages), surrogate)
        clipped = clipped | ((advantages < 0) & (ratio > dual))
    return TokenLoss(-surrogate, (clipped & batch.mask).detach())
