"""The critic's loss, and advantages and returns from its values."""

import torch
from torch import Tensor

from posttrain.algorithms.policy import TokenLoss
from posttrain.algorithms.token_batch import TokenBatch


def value_loss(batch: TokenBatch, clip: float | None = 0.2) -> TokenLoss:
    """Computes PPO's value loss per token: 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    OpenAI baselines, ppo2; see Huang et al. 2022, "The 37 implementation details of PPO". Without `clip` it is half
    the squared error.
    """
    if batch.values is None:
        raise ValueError("the batch has no values, which the critic's loss needs")
    values, returns = batch.inside(batch.values), batch.need("returns")
    error = (values - returns).square()
    clipped = torch.zeros_like(batch.mask)
    if clip is not None:
        old = batch.need("old_values")
        bounded = (torch.minimum(torch.maximum(values, old - clip), old + clip) - returns).square()
        clipped = ((bounded > error) & batch.mask).detach()
        error = torch.maximum(error, bounded)
    return TokenLoss(error / 2, clipped)


def gae(batch: TokenBatch, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Returns generalized advantage estimates and returns, both [B, S] and 0 outside the mask.

    Schulman et al. 2015 (arXiv 1506.02438): delta = r + gamma V' - V, A = delta + gamma lam A', R = A + V, from each
    sequence's end, after which V' and A' are 0. Where the mask has a gap (a tool's answer), V' and A' are those of the
    next masked token of the sequence. `old_values` are the critic's, or `values` where the batch has none.
    """
    values = batch.need("old_values" if batch.old_values is not None else "values")
    rewards = batch.need("rewards")
    advantages = torch.zeros_like(values)
    next_value, next_advantage = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    current = torch.full_like(batch.sequences[:, 0], -2)
    for t in range(values.shape[1] - 1, -1, -1):
        here = batch.mask[:, t]
        goes_on = here & (batch.sequences[:, t] == current)
        delta = rewards[:, t] + gamma * torch.where(goes_on, next_value, 0.0) - values[:, t]
        advantage = delta + gamma * lam * torch.where(goes_on, next_advantage, 0.0)
        advantages[:, t] = torch.where(here, advantage, 0.0)
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantage, next_advantage)
        current = torch.where(here, batch.sequences[:, t], current)
    return advantages, advantages + values


def discounted_returns(batch: TokenBatch, rewards: Tensor, gamma: float = 1.0) -> Tensor:
    """Returns for each token the discounted sum of its own and all later rewards of its sequence; 0 outside the mask.

    It is GAE with values of 0 and lam = 1.
    """
    return gae(batch.but(rewards=rewards, old_values=torch.zeros_like(rewards)), gamma, lam=1.0)[0]
