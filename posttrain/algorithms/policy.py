"""Token losses of policy optimization: the clipped surrogate and the KL estimators.

Every function works elementwise on log-probabilities (natural logarithm) of the sampled tokens; the trainer masks and
averages.
"""

from enum import StrEnum

import torch
from torch import Tensor


class KLEstimator(StrEnum):
    """Single-sample estimators of KL(policy || reference), with x = log policy - log reference (Schulman 2020)."""

    K1 = "k1"  # x: unbiased, its gradient is zero in expectation
    K2 = "k2"  # x^2 / 2: biased, low variance
    K3 = "k3"  # exp(-x) + x - 1: unbiased, never negative


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """Returns PPO's clipped surrogate per token: -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A).

    Schulman et al. 2017 (arXiv 1707.06347, eq. 7); clip_high > clip_low is DAPO's clip-higher (arXiv
    2503.14476); `dual_clip` c bounds the loss by -c A where A < 0 (Ye et al. 2020, arXiv 1912.09729, eq. 5).
    No gradient flows into `old_logprobs` or `advantages`.
    """
    ratio = torch.exp(logprobs - old_logprobs.detach())
    advantages = advantages.detach()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    return -surrogate


def clipped_share(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """Returns bool per token, True where clipping removes the gradient: the ratio left the range in A's direction."""
    ratio = torch.exp(logprobs - old_logprobs)
    return ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))


def kl_estimate(
    logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator, clamp: float | None = None
) -> Tensor:
    """Estimates KL(policy || reference) per token, in nats; `clamp` limits the absolute value (NeMo uses 10)."""
    x = logprobs - reference_logprobs.detach()
    match KLEstimator(estimator):
        case KLEstimator.K1:
            kl = x
        case KLEstimator.K2:
            kl = x.square() / 2
        case KLEstimator.K3:
            kl = torch.exp(-x) + x - 1
    return kl if clamp is None else kl.clamp(-clamp, clamp)
