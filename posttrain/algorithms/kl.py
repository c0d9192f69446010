"""Single-sample estimators of the KL divergence of the policy from the reference, as a loss or inside the reward.

The gradient of the expected KL has two parts: of the estimate itself, and of the probability with which the token was
sampled. Most code bases leave out the second one; `Sampling` names those that do not.
"""

from enum import StrEnum

import torch
from torch import Tensor

from posttrain.algorithms.token_batch import TokenBatch

NEMO_CLAMP = 10.0  # NeMo-RL limits the estimate to this, and the log-ratio before it to twice this


class KLEstimator(StrEnum):
    """Single-sample estimators of KL(policy || reference), with x = log policy - log reference (Schulman 2020)."""

    K1 = "k1"  # x: unbiased as a value, but as a loss its gradient is zero in expectation; use it in the reward
    K2 = "k2"  # x^2 / 2: biased as a value; as a loss its gradient is that of the KL
    K3 = "k3"  # exp(-x) + x - 1: unbiased as a value, never negative


class Sampling(StrEnum):
    """Factor on the estimate, with gradient, that accounts for how the token was sampled."""

    NONE = "none"  # 1: the sampling is taken as given (TRL and verl by default)
    SCORE = "score"  # policy / stop-gradient(policy): 1, with the gradient of the sampling probability (NeMo-RL)
    OLD = "old"  # policy / old policy (TRL's use_bias_correction_kl; DeepSeek-V3.2)
    ROLLOUT = "rollout"  # policy / sampler's policy (NeMo-RL's use_on_policy_kl_approximation)


def kl_estimate(
    logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator, clamp: float | None = None
) -> Tensor:
    """Estimates KL(policy || reference) per token, in nats.

    `clamp` limits the estimate's absolute value, and the log-ratio before it to twice that (NeMo-RL: 10).
    """
    x = logprobs - reference_logprobs.detach()
    if clamp is not None:
        x = x.clamp(-2 * clamp, 2 * clamp)
    match KLEstimator(estimator):
        case KLEstimator.K1:
            kl = x
        case KLEstimator.K2:
            kl = x.square() / 2
        case KLEstimator.K3:
            kl = torch.exp(-x) + x - 1
    return kl if clamp is None else kl.clamp(-clamp, clamp)


def kl_penalty(
    batch: TokenBatch,
    estimator: KLEstimator = KLEstimator.K3,
    clamp: float | None = None,
    sampling: Sampling = Sampling.NONE,
) -> Tensor:
    """Returns the KL from the reference per token, to be multiplied by beta and added to the policy's loss."""
    logprobs = batch.inside(batch.logprobs)
    kl = kl_estimate(logprobs, batch.need("ref_logprobs"), estimator, clamp)
    match Sampling(sampling):
        case Sampling.NONE:
            return kl
        case Sampling.SCORE:
            sampled = logprobs.detach()
        case Sampling.OLD:
            sampled = batch.need("old_logprobs")
        case Sampling.ROLLOUT:
            sampled = batch.need("rollout_logprobs")
    return kl * torch.exp(logprobs - sampled)


def rewards_with_kl(
    batch: TokenBatch, beta: float, estimator: KLEstimator = KLEstimator.K1, clamp: float | None = None
) -> Tensor:
    """Returns the rewards of tokens less beta times the KL of the old policy from the reference at each.

    So PPO keeps near the reference (Ziegler et al. 2019, arXiv 1909.08593, eq. 2). 0 outside the mask.
    """
    old = batch.need("old_logprobs" if batch.old_logprobs is not None else "rollout_logprobs")
    kl = kl_estimate(old, batch.need("ref_logprobs"), estimator, clamp)
    return batch.need("rewards") - beta * kl
