"""Advantages without a critic: the rewards of a rollout's completions compared with one another, by a dialect."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from configs.rl import RLSection
from posttrain.algorithms.advantages import decoupled_sums, equal_groups
from posttrain.algorithms.dialects import Dialect
from posttrain.algorithms.kl import KLEstimator, rewards_with_kl
from posttrain.algorithms.reward_shaping import overlong_penalty, reward_at_last_token
from posttrain.algorithms.token_batch import TokenBatch
from posttrain.rl.rollout import PART, Rollout
from pretrain.parallel.engine import Engine


@dataclass(frozen=True)
class GroupCredit:
    """Credit that gives the tokens of a rollout the advantages of a dialect, from the rewards of their groups."""

    dialect: Dialect
    settings: RLSection
    max_length: int  # tokens of the longest completion
    weights: Mapping[str, float] = field(default_factory=dict)  # of the task's rewards, if it has several

    names = ("advantages",)

    def __call__(self, rollout: Rollout, engine: Engine) -> Rollout:
        """Returns the rollout with `advantages` [N, S]; several rewards are first combined into `decoupled` [N, S]."""
        if len(self.weights) > 1:
            sums_PG = decoupled_sums(*self._by_reward(rollout))
            at_last = reward_at_last_token(sums_PG.flatten(), _ends(rollout), rollout.mask.shape[1])
            rollout = rollout.plus(decoupled=at_last.float().numpy())
        batch = token_batch(rollout, self.settings, self.max_length)
        return rollout.plus(advantages=self.dialect.advantages(batch).float().numpy())

    def equal_groups(self, rollout: Rollout) -> np.ndarray:
        """Returns bool [groups], True for those that the dialect learns nothing from, as their rewards are all equal.

        A dialect that compares several rewards each by itself learns from groups whose sums alone are equal, and one
        that compares the whole rollout from all that are scored, unless all rewards are equal.
        """
        if self.dialect.over_rollout:
            rewards, scored = rollout.rewards()
            alike = bool(equal_groups(rewards.view(1, -1), scored.view(1, -1))) and self.settings.kl != "reward"
            return np.full(len(rewards), True) if alike else rollout.unscored_groups()
        if len(self.weights) < 2 or not self.dialect.by_reward:
            return rollout.equal_groups()
        rewards_PGK, scored_PGK, _ = self._by_reward(rollout)
        equal = [equal_groups(rewards_PGK[..., k], scored_PGK[..., k]) for k in range(rewards_PGK.shape[2])]
        return torch.stack(equal).all(0).numpy()

    def _by_reward(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the rewards [P, G, K] of each name, which of them are scored, and their weights [K].

        The penalty on overlong completions counts as one more reward.
        """
        parts, weights = [rollout.arrays[PART + name] for name in self.weights], list(self.weights.values())
        if self.settings.overlong_buffer:
            parts.append(_overlong(rollout, self.settings, self.max_length).numpy())
            weights.append(1.0)
        rewards_NK = torch.from_numpy(np.stack(parts, -1))
        scored_NK = ~rewards_NK.isnan() & ~torch.from_numpy(np.isnan(rollout.scores))[:, None]
        shape = (-1, rollout.group_size, len(weights))
        return rewards_NK.nan_to_num().view(shape), scored_NK.view(shape), torch.tensor(weights)


def token_batch(rollout: Rollout, settings: RLSection, max_length: int) -> TokenBatch:
    """Returns the tokens of a rollout's scored samples, with rewards less the penalties on length and divergence.

    Raises ValueError if the divergence is charged and the rollout lacks the reference's log-probabilities.
    """
    scored = torch.from_numpy(~np.isnan(rollout.scores))
    rewards = torch.where(scored, torch.from_numpy(rollout.scores), 0.0)
    sampled = torch.from_numpy(rollout.mask)
    if settings.overlong_buffer:
        rewards = rewards + _overlong(rollout, settings, max_length)
    length = sampled.shape[1]
    optional = {
        name: torch.from_numpy(rollout.arrays[name])
        for name in ("old_logprobs", "ref_logprobs", "old_values", "decoupled")
        if name in rollout.arrays
    }
    rows = torch.arange(len(rollout))[:, None]
    batch = TokenBatch(
        logprobs=torch.from_numpy(rollout.rollout_logprobs),
        mask=sampled & scored[:, None],
        sequences=(rows * length).expand(-1, length),
        rollout_logprobs=torch.from_numpy(rollout.rollout_logprobs),
        groups=torch.from_numpy(rollout.prompts)[:, None].expand(-1, length),
        rewards=reward_at_last_token(rewards, _ends(rollout), length),
        **optional,
    )
    if settings.kl == "reward":
        batch = batch.but(rewards=rewards_with_kl(batch, settings.kl_coef, KLEstimator(settings.estimator)))
    return batch


def _ends(rollout: Rollout) -> torch.Tensor:
    """Returns for each completion [N] the position after its last token."""
    sampled = torch.from_numpy(rollout.mask)
    return (sampled * torch.arange(sampled.shape[1])).amax(1) + 1


def _overlong(rollout: Rollout, settings: RLSection, max_length: int) -> torch.Tensor:
    lengths = torch.from_numpy(rollout.completion_lengths())
    return overlong_penalty(lengths, max_length, settings.overlong_buffer, settings.overlong_penalty)
