"""Advantages of completions from their rewards: compared within the group of one prompt, or within the whole step.

"GRPO" means several formulas in the field; each has the name of the code base that uses it. `critic` has the
advantages that need a critic (GAE), `reward_shaping` what is done to rewards beforehand.
"""

from enum import StrEnum

import torch
from torch import Tensor

from posttrain.algorithms.normalisation import Moments, whiten
from posttrain.algorithms.token_batch import TokenBatch
from posttrain.algorithms.value_loss import discounted_returns

GDPO_EPSILON = 1e-4  # added to standard deviations, as the authors' code for TRL does


class AdvantageDialect(StrEnum):
    """Formula from rewards r of a group to advantages; mu, sigma: the group's mean and standard deviation (ddof 1)."""

    GRPO_TRL = "grpo@trl"  # (r - mu) / (sigma + 1e-4)
    GRPO_VERL = "grpo@verl"  # (r - mu) / (sigma + 1e-6)
    GRPO_NEMO = "grpo@nemo"  # mu and sigma of the OTHER samples, eps 1e-6; not divided where that sigma is 0
    DR_GRPO = "dr_grpo"  # r - mu (Liu et al. 2025, arXiv 2503.20783)
    RLOO = "rloo"  # r - mean of the others (Ahmadian et al. 2024, arXiv 2402.14740)


def group_advantages(rewards_PG: Tensor, scored_PG: Tensor, dialect: AdvantageDialect) -> Tensor:
    """Returns the advantages [P, G] of P groups of G rewards (Shao et al. 2024, arXiv 2402.03300) by `dialect`.

    `scored_PG` (bool) is False where the verifier could not score a sample. Such a sample counts in no mean and has
    advantage 0, and so has a sample that is the only scored one of its group. Groups of equal rewards have advantages
    of exactly 0, so that rounding in the mean, divided by a tiny epsilon, does not become a gradient. Raises
    ValueError if the shapes differ.
    """
    if rewards_PG.ndim != 2 or rewards_PG.shape != scored_PG.shape:
        raise ValueError(
            f"rewards {list(rewards_PG.shape)} and scored {list(scored_PG.shape)} must both be [groups, group size]"
        )
    count_P1 = scored_PG.sum(1, keepdim=True)
    r_PG = torch.where(scored_PG, rewards_PG, 0.0)
    total_P1 = r_PG.sum(1, keepdim=True)
    mean_P1 = total_P1 / count_P1.clamp(min=1)
    centred_PG = r_PG - mean_P1
    squares_P1 = (centred_PG.square() * scored_PG).sum(1, keepdim=True)
    deviation_P1 = (squares_P1 / (count_P1 - 1).clamp(min=1)).sqrt()
    leave_one_out_PG = r_PG - (total_P1 - r_PG) / (count_P1 - 1).clamp(min=1)

    match AdvantageDialect(dialect):
        case AdvantageDialect.GRPO_TRL:
            advantages_PG = centred_PG / (deviation_P1 + 1e-4)
        case AdvantageDialect.GRPO_VERL:
            advantages_PG = centred_PG / (deviation_P1 + 1e-6)
        case AdvantageDialect.GRPO_NEMO:
            deviation_PG = _deviation_of_others(r_PG, scored_PG)
            # Equal rewards of the others have deviation 0, which divides nothing; the threshold allows for rounding.
            flat_PG = deviation_PG <= 1e-7 * r_PG.abs().amax(1, keepdim=True)
            advantages_PG = torch.where(flat_PG, leave_one_out_PG, leave_one_out_PG / (deviation_PG + 1e-6))
        case AdvantageDialect.DR_GRPO:
            advantages_PG = centred_PG
        case AdvantageDialect.RLOO:
            advantages_PG = leave_one_out_PG
    live_PG = scored_PG & (count_P1 > 1) & ~equal_groups(rewards_PG, scored_PG)[:, None]
    return torch.where(live_PG, advantages_PG, 0.0)


def equal_groups(rewards_PG: Tensor, scored_PG: Tensor) -> Tensor:
    """Returns bool [P], True for groups whose scored rewards are all equal; they contribute no gradient.

    These are the groups that DAPO's dynamic sampling drops and samples others for (arXiv 2503.14476, eq. 11). A group
    with no scored reward, or one, counts among them.
    """
    highest_P = torch.where(scored_PG, rewards_PG, -torch.inf).amax(1)
    lowest_P = torch.where(scored_PG, rewards_PG, torch.inf).amin(1)
    return highest_P <= lowest_P


def decoupled_sums(rewards_PGK: Tensor, scored_PGK: Tensor, weights_K: Tensor) -> Tensor:
    """Returns [P, G]: K rewards, each normalised in its group, summed with weights; GDPO's first step.

    Liu et al. 2026 (arXiv 2601.05242, eq. 4 and 5), with `GDPO_EPSILON`. A reward that is not scored adds 0, and so
    does one that is equal in the whole group. The second step is `batch_normalised`.
    """
    if rewards_PGK.ndim != 3 or rewards_PGK.shape != scored_PGK.shape or weights_K.shape != rewards_PGK.shape[2:]:
        raise ValueError(
            f"rewards {list(rewards_PGK.shape)} and scored {list(scored_PGK.shape)} must both be [groups, group size, "
            f"number of rewards], with one weight for each reward, not {list(weights_K.shape)}"
        )
    parts = [
        weight * group_advantages(rewards_PGK[..., k], scored_PGK[..., k], AdvantageDialect.GRPO_TRL)
        for k, weight in enumerate(weights_K)
    ]
    return torch.stack(parts).sum(0)


def batch_normalised(sums_PG: Tensor, scored_PG: Tensor, moments: Moments | None = None) -> Tensor:
    """Returns (sum - mean) / (standard deviation + epsilon) over all scored samples of the step; GDPO's second step.

    Liu et al. 2026 (arXiv 2601.05242, eq. 6). `moments` are those of the whole step where this is a part of it.
    """
    moments = moments or Moments.of(sums_PG, scored_PG)
    deviation = moments.variance() ** 0.5
    if deviation <= 1e-6 * abs(moments.mean):
        return torch.zeros_like(sums_PG)
    return torch.where(scored_PG, (sums_PG - moments.mean) / (deviation + GDPO_EPSILON), 0.0)


def reinforce_pp(batch: TokenBatch, moments: Moments | None = None, ddof: int = 0) -> Tensor:
    """Returns REINFORCE++'s advantages of tokens: the rewards still to come, normalised over all tokens of the step.

    Hu 2025 (arXiv 2501.03262). `rewards` hold the KL already (see `kl.rewards_with_kl`); for the variant with a
    baseline they are less the group's mean. `moments` are those of `discounted_returns` over the whole step. OpenRLHF
    takes ddof 0, verl 1.
    """
    return whiten(discounted_returns(batch, batch.need("rewards")), batch.mask, moments, ddof)


def _deviation_of_others(r_PG: Tensor, scored_PG: Tensor) -> Tensor:
    """Returns [P, G]: the standard deviation (ddof 1) of the scored rewards of each sample's group without itself.

    It is computed in two passes, so that equal rewards give exactly 0.
    """
    group = r_PG.shape[1]
    mates_PGG = scored_PG[:, None, :] & ~torch.eye(group, dtype=torch.bool, device=r_PG.device)
    count_PG = mates_PGG.sum(2)
    mean_PG = (r_PG[:, None, :] * mates_PGG).sum(2) / count_PG.clamp(min=1)
    squares_PG = ((r_PG[:, None, :] - mean_PG[:, :, None]).square() * mates_PGG).sum(2)
    return (squares_PG / (count_PG - 1).clamp(min=1)).sqrt()
