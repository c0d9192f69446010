"""Advantages without a critic: the rewards of a rollout's completions compared with one another, by a dialect."""

from dataclasses import dataclass

import numpy as np
import torch

from configs.rl import RLSection
from posttrain.algorithms.dialects import Dialect
from posttrain.algorithms.kl import KLEstimator, rewards_with_kl
from posttrain.algorithms.rewards import overlong_penalty, reward_at_last_token
from posttrain.algorithms.token_batch import TokenBatch
from posttrain.rl.rollout import Rollout
from pretrain.parallel.engine import Engine


@dataclass(frozen=True)
class GroupCredit:
    """Gives the tokens of a rollout the advantages of a dialect; see `rollout_source.Credit`."""

    dialect: Dialect
    settings: RLSection
    max_length: int  # tokens of the longest completion

    names = ("advantages",)

    def __call__(self, rollout: Rollout, engine: Engine) -> Rollout:
        """Returns the rollout with `advantages` [N, S]."""
        batch = token_batch(rollout, self.settings, self.max_length)
        return rollout.plus(advantages=self.dialect.advantages(batch).float().numpy())


def token_batch(rollout: Rollout, settings: RLSection, max_length: int) -> TokenBatch:
    """Returns a rollout's tokens with their rewards, less what length and divergence cost, but no unscorable samples.

    Raises ValueError if the divergence is charged and the rollout lacks the reference's log-probabilities.
    """
    scored = torch.from_numpy(~np.isnan(rollout.scores))
    rewards = torch.where(scored, torch.from_numpy(rollout.scores), 0.0)
    sampled = torch.from_numpy(rollout.mask)
    if settings.overlong_buffer:
        lengths = sampled.sum(1)
        rewards = rewards + overlong_penalty(lengths, max_length, settings.overlong_buffer, settings.overlong_penalty)
    length = sampled.shape[1]
    last = (sampled * torch.arange(length)).amax(1)
    optional = {
        name: torch.from_numpy(rollout.arrays[name])
        for name in ("old_logprobs", "ref_logprobs", "old_values")
        if name in rollout.arrays
    }
    rows = torch.arange(len(rollout))[:, None]
    batch = TokenBatch(
        logprobs=torch.from_numpy(rollout.rollout_logprobs),
        mask=sampled & scored[:, None],
        sequences=(rows * length).expand(-1, length),
        rollout_logprobs=torch.from_numpy(rollout.rollout_logprobs),
        groups=torch.from_numpy(rollout.prompts)[:, None].expand(-1, length),
        rewards=reward_at_last_token(rewards, last + 1, length),
        **optional,
    )
    if settings.kl == "reward":
        batch = batch.but(rewards=rewards_with_kl(batch, settings.kl_coef, KLEstimator(settings.estimator)))
    return batch
