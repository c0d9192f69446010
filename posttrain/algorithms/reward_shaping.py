"""Changes to rewards before advantages are computed from them."""

import torch
from torch import Tensor


def overlong_penalty(lengths: Tensor, longest: int, buffer: int, penalty: float) -> Tensor:
    """Returns what is added to the rewards of completions of `lengths` tokens: 0, or less near and past `longest`.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): from 0 at longest - buffer tokens in a straight line to
    -penalty at `longest`, and -penalty past it. Raises ValueError if the buffer is not between 1 and `longest`.
    """
    if not 0 < buffer <= longest:
        raise ValueError(
            f"the overlong buffer of {buffer} tokens must be at least 1 and at most the longest, {longest}"
        )
    over = (lengths - (longest - buffer)) / buffer
    return (-penalty * over).clamp(min=-penalty, max=0.0)


def reward_at_last_token(rewards_N: Tensor, lengths_N: Tensor, length: int) -> Tensor:
    """Returns rewards of tokens [N, length] of N completions, one a row: each one's reward is at its last token."""
    at = torch.arange(length, device=rewards_N.device) == (lengths_N - 1)[:, None]
    return torch.where(at, rewards_N[:, None], 0.0)
