"""Methods by name, as a paper or code base defines them: one table of advantage, policy loss and aggregation.

A dialect is a set of choices among the functions of this folder. Names of methods that code bases define differently
end in that of the code base. Numbers are those that the source gives as its default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from posttrain.algorithms.advantages import (
    AdvantageDialect,
    batch_normalised,
    group_advantages,
    reinforce_pp,
)
from posttrain.algorithms.aggregation import Aggregation, aggregate
from posttrain.algorithms.normalisation import whiten
from posttrain.algorithms.policy import TokenLoss, cispo, gspo, ppo_clip
from posttrain.algorithms.token_batch import TokenBatch
from posttrain.algorithms.value_loss import gae

DAPO_CLIP_HIGH = 0.28
VERL_DUAL_CLIP = 3.0


@dataclass(frozen=True)
class Dialect:
    """A method: how advantages come from a batch's rewards, the policy loss, and how token losses are averaged."""

    source: str
    advantages: Callable[[TokenBatch], Tensor]  # [B, S]
    policy: Callable[[TokenBatch], TokenLoss]
    aggregation: Aggregation
    over_rollout: bool = False  # rewards are compared over the whole rollout, so that equal groups may have a gradient
    by_reward: bool = False  # several rewards are compared each by itself, so that equal sums may have a gradient

    def loss(self, batch: TokenBatch, max_length: int) -> tuple[Tensor, TokenLoss]:
        """Returns the loss of a step that is all in one batch with rewards, and its parts per token.

        Raises ValueError if the batch lacks a tensor that the method needs.
        """
        found = self.policy(batch.but(advantages=self.advantages(batch)))
        return aggregate(found.loss, batch, self.aggregation, max_length), found


def from_groups(batch: TokenBatch, dialect: AdvantageDialect) -> Tensor:
    """Returns advantages of tokens [B, S] by the rewards of completions that share a prompt (`groups`).

    Groups may differ in size.
    """
    rewards, index, last = _matrix(batch)
    return _to_tokens(batch, group_advantages(rewards, index >= 0, dialect), index, last)


def from_decoupled_groups(batch: TokenBatch) -> Tensor:
    """Returns GDPO's advantages [B, S]: rewards, each normalised in its group, and their sum again over the batch.

    The sums are `decoupled`; a batch without them has one reward.
    """
    if batch.decoupled is not None:
        sums, index, last = _matrix(batch, "decoupled")
    else:
        rewards, index, last = _matrix(batch)
        sums = group_advantages(rewards, index >= 0, AdvantageDialect.GRPO_TRL)
    return _to_tokens(batch, batch_normalised(sums, index >= 0), index, last)


def from_batch(batch: TokenBatch, baseline: bool, ddof: int) -> Tensor:
    """Returns REINFORCE++'s advantages [B, S]; with `baseline` each reward is taken less its group's mean."""
    if baseline:
        centred = from_groups(batch, AdvantageDialect.DR_GRPO)
        batch = batch.but(rewards=torch.where(batch.first_and_last()[1], centred, 0.0))
    return reinforce_pp(batch, ddof=ddof)


def from_critic(batch: TokenBatch) -> Tensor:
    """Returns GAE's advantages [B, S] at gamma 1 and lambda .95, whitened over the batch."""
    return whiten(gae(batch)[0], batch.mask)


def _matrix(batch: TokenBatch, name: str = "rewards") -> tuple[Tensor, Tensor, Tensor]:
    """Returns rewards [P, G] of completions by group, their numbers [P, G] in the batch, and their last tokens.

    Rewards are those of the tensor `name`. A group that is smaller than the largest has number -1 at its end.
    """
    _, last = batch.first_and_last()
    rewards = batch.sequence_sum(batch.need(name))[last]
    _, group = batch.need("groups")[last].unique(return_inverse=True)
    counts = group.bincount(minlength=1)
    index = torch.full((len(counts), max(1, int(counts.max()))), -1)
    found = torch.zeros(index.shape, dtype=rewards.dtype)
    filled = [0] * len(counts)
    for number, p in enumerate(group.tolist()):
        index[p, filled[p]], found[p, filled[p]] = number, rewards[number]
        filled[p] += 1
    return found, index, last


def _to_tokens(batch: TokenBatch, advantages_PG: Tensor, index_PG: Tensor, last: Tensor) -> Tensor:
    of_sequence = torch.zeros(int(last.sum()), dtype=advantages_PG.dtype)
    of_sequence[index_PG[index_PG >= 0]] = advantages_PG[index_PG >= 0]
    at_last = torch.zeros_like(batch.logprobs).detach()
    at_last[last] = of_sequence
    return torch.where(batch.mask, batch.sequence_sum(at_last), 0.0)


def _groups(dialect: AdvantageDialect) -> Callable[[TokenBatch], Tensor]:
    return partial(from_groups, dialect=dialect)


_MEAN, _SEQUENCE, _FIXED = Aggregation.TOKEN_MEAN, Aggregation.SEQUENCE_MEAN, Aggregation.FIXED_LENGTH
_TRL, _VERL, _NEMO = (
    _groups(AdvantageDialect.GRPO_TRL),
    _groups(AdvantageDialect.GRPO_VERL),
    _groups(AdvantageDialect.GRPO_NEMO),
)

DIALECTS: dict[str, Dialect] = {
    "ppo": Dialect("Schulman et al. 2017, arXiv 1707.06347; TRL", from_critic, ppo_clip, _MEAN),
    "ppo@verl": Dialect("verl, with its dual clip", from_critic, partial(ppo_clip, dual=VERL_DUAL_CLIP), _MEAN),
    "grpo@trl": Dialect("Shao et al. 2024, arXiv 2402.03300; TRL, loss_type grpo", _TRL, ppo_clip, _SEQUENCE),
    "grpo@verl": Dialect("verl, with its dual clip", _VERL, partial(ppo_clip, dual=VERL_DUAL_CLIP), _MEAN),
    "grpo@nemo": Dialect("NeMo-RL, leave-one-out mean and deviation", _NEMO, ppo_clip, _MEAN),
    "dr_grpo": Dialect("Liu et al. 2025, arXiv 2503.20783", _groups(AdvantageDialect.DR_GRPO), ppo_clip, _FIXED),
    "dapo": Dialect("Yu et al. 2025, arXiv 2503.14476", _VERL, partial(ppo_clip, high=DAPO_CLIP_HIGH), _MEAN),
    "rloo": Dialect("Ahmadian et al. 2024, arXiv 2402.14740", _groups(AdvantageDialect.RLOO), ppo_clip, _MEAN),
    "reinforce_pp": Dialect(
        *("Hu 2025, arXiv 2501.03262; OpenRLHF", partial(from_batch, baseline=False, ddof=0), ppo_clip, _MEAN),
        over_rollout=True,
    ),
    "reinforce_pp@verl": Dialect(
        "verl", partial(from_batch, baseline=False, ddof=1), ppo_clip, _MEAN, over_rollout=True
    ),
    "reinforce_pp_baseline": Dialect(
        "Hu 2025, arXiv 2501.03262; OpenRLHF", partial(from_batch, baseline=True, ddof=0), ppo_clip, _MEAN
    ),
    "gspo": Dialect("Zheng et al. 2025, arXiv 2507.18071", _TRL, gspo, _SEQUENCE),
    "cispo@minimax": Dialect("MiniMax-M1, arXiv 2506.13585", _TRL, cispo, _MEAN),
    "cispo@verl": Dialect("verl, both bounds", _VERL, partial(cispo, lowest=0.8, highest=1.2), _MEAN),
    "gdpo": Dialect("Liu et al. 2026, arXiv 2601.05242", from_decoupled_groups, ppo_clip, _MEAN, by_reward=True),
}
