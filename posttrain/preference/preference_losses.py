"""Losses of preferences, each a pure function of the log-probabilities of whole answers, as in its paper.

A `Pairs` holds N pairs of answers to the same prompt, of which one was chosen. `delta` is the difference of the two
answers' log-ratios of policy and reference; beta times a log-ratio is the answer's implicit reward. KTO takes answers
that are not paired. Every function returns the loss of each pair or answer; the trainer averages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LEAST_DISTANCE = 1e-6  # ORPO's odds of an answer that is nearly certain are computed as if it were so far from it


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities (natural) of N pairs of answers, summed over the tokens of each answer; all tensors are [N]."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor  # tokens
    rejected_length: Tensor

    @property
    def delta(self) -> Tensor:
        """Log-ratio of the chosen answer less that of the rejected one."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)

    @property
    def mean_delta(self) -> Tensor:
        """Log-ratio per token of the chosen answer less that of the rejected one."""
        chosen = (self.chosen - self.ref_chosen) / self.chosen_length
        return chosen - (self.rejected - self.ref_rejected) / self.rejected_length


PairLoss = Callable[[Pairs], Tensor]


def dpo(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """Computes -log sigmoid(beta delta) (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""
    return -logsigmoid(beta * pairs.delta)


def conservative(pairs: Pairs, beta: float = 0.1, smoothing: float = 0.1) -> Tensor:
    """Computes DPO's loss for labels of which a share `smoothing` is taken to be wrong.

    It is the mean of the losses of both orders of a pair, weighted by that share.

    Mitchell 2023, "A note on DPO with noisy preferences", eq. 3 (cDPO).
    """
    logit = beta * pairs.delta
    return -(1 - smoothing) * logsigmoid(logit) - smoothing * logsigmoid(-logit)


def robust(pairs: Pairs, beta: float = 0.1, smoothing: float = 0.1) -> Tensor:
    """Computes an estimate of DPO's loss that wrong labels do not bias (Chowdhury et al. 2024, arXiv 2403.00409).

    `smoothing`, below 1/2, is the share of labels that are wrong.
    """
    logit = beta * pairs.delta
    return (-(1 - smoothing) * logsigmoid(logit) + smoothing * logsigmoid(-logit)) / (1 - 2 * smoothing)


def ipo(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """Computes (delta - 1 / (2 beta))^2 with log-probabilities summed (Azar et al. 2023, arXiv 2310.12036, eq. 17)."""
    return (pairs.delta - 1 / (2 * beta)).square()


def ipo_mean(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """Computes IPO's loss with log-probabilities per token, as its authors advised and TRL has it."""
    return (pairs.mean_delta - 1 / (2 * beta)).square()


def hinge(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """Computes max(0, 1 - beta delta) (SLiC, Zhao et al. 2023, arXiv 2305.10425; Liu et al. 2023, arXiv 2309.06657)."""
    return torch.relu(1 - beta * pairs.delta)


def orpo(pairs: Pairs, beta: float = 0.1) -> Tensor:
    """Computes -log p_c - beta log sigmoid(log odds_c - log odds_r), p: geometric mean of the tokens' probabilities.

    Hong et al. 2024 (arXiv 2403.07691, eq. 6 and 7); beta is its lambda. There is no reference. Every pair's own mean
    counts alike, where TRL takes the first term's mean over all tokens.
    """
    chosen, rejected = (_per_token(*answer) for answer in _answers(pairs))
    return -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo(pairs: Pairs, beta: float = 2.0, margin: float = 1.0) -> Tensor:
    """Computes -log sigmoid(beta (log p_c - log p_r) - margin), p: geometric mean of the tokens' probabilities.

    Meng et al. 2024 (arXiv 2405.14734, eq. 6); margin is its gamma. There is no reference.
    """
    chosen, rejected = (_per_token(*answer) for answer in _answers(pairs))
    return -logsigmoid(beta * (chosen - rejected) - margin)


def kto(
    logratio: Tensor,
    desirable: Tensor,
    reference_point: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Computes KTO's loss of answers [N] that are each desirable or not (Ethayarajh et al. 2024, arXiv 2402.01306).

    `logratio` is log policy - log reference of an answer, `desirable` bool. The loss is weight (1 - sigmoid(beta
    (logratio - z0))) where desirable, and weight (1 - sigmoid(beta (z0 - logratio))) where not (eq. 8).
    `reference_point` is z0, see `kl_reference_point`; no gradient goes into it.
    """
    z0 = torch.as_tensor(reference_point, dtype=logratio.dtype, device=logratio.device).detach()
    value = torch.where(desirable, logratio - z0, z0 - logratio)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - torch.sigmoid(beta * value))


def kl_reference_point(mismatched_logratio: float) -> float:
    """Returns KTO's z0 from the mean log-ratio of answers to other prompts' questions over the step: at least 0."""
    return max(0.0, mismatched_logratio)


def with_sft(loss: PairLoss, weight: float) -> PairLoss:
    """Returns a loss with `weight` times the chosen answer's mean negative log-probability per token added.

    It keeps the chosen answer likely (RPO, Pang et al. 2024, arXiv 2404.19733, eq. 2).
    """
    return lambda pairs: loss(pairs) - weight * pairs.chosen / pairs.chosen_length


# Losses of pairs by name; each takes beta, those in SMOOTHED also `smoothing`, and simpo `margin`.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo,
    "conservative": conservative,
    "robust": robust,
    "ipo": ipo,
    "ipo_mean": ipo_mean,
    "hinge": hinge,
    "orpo": orpo,
    "simpo": simpo,
}
SMOOTHED = ("conservative", "robust")
WITHOUT_REFERENCE = ("orpo", "simpo")


def pair_loss(name: str, beta: float, smoothing: float = 0.1, margin: float = 1.0, sft_weight: float = 0.0) -> PairLoss:
    """Returns the loss of pairs that is called `name`, with these numbers."""
    numbers = {"beta": beta}
    if name in SMOOTHED:
        numbers["smoothing"] = smoothing
    if name == "simpo":
        numbers["margin"] = margin
    loss = partial(LOSSES[name], **numbers)
    return with_sft(loss, sft_weight) if sft_weight else loss


def _answers(pairs: Pairs) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return (pairs.chosen, pairs.chosen_length), (pairs.rejected, pairs.rejected_length)


def _per_token(logprob: Tensor, length: Tensor) -> Tensor:
    return logprob / length


def _log_odds(logprob: Tensor) -> Tensor:
    """Returns log(p / (1 - p))."""
    return logprob - torch.log(-torch.expm1(logprob.clamp(max=-LEAST_DISTANCE)))
