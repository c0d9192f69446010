"""The check that sampler and trainer, which are different code, agree on the policy before it is first updated."""

import torch

from configs.loader import Failure


class LogprobCheck:
    """Raises Failure if log-probabilities differ by more than `most` nats a token on average, the value of `key`.

    If the two differ before the first update, the probability ratio would measure a difference in code, not in policy.
    Only the first call of a process checks, unless `every_rollout` is True, which a sampler needs that is given a copy
    of the weights each time: it may not have taken them.
    """

    def __init__(self, most: float, key: str = "grpo.max_logprob_difference", every_rollout: bool = False) -> None:
        self._most, self._key, self._every_rollout = most, key, every_rollout
        self.is_due = True

    def __call__(self, difference: torch.Tensor, mask: torch.Tensor) -> None:
        """Checks absolute differences, of the tokens in `mask`."""
        if not self.is_due:
            return
        self.is_due = self._every_rollout
        found = difference[mask].detach()
        mean = float(found.double().mean()) if len(found) else 0.0
        if not mean <= self._most:
            when = "a rollout's first update" if self._every_rollout else "the first update"
            raise Failure(
                f"before {when}, log-probabilities of sampler and trainer differ by {mean:.4g} nats a token "
                f"(at most {float(found.max()):.4g}), above {self._key} = {self._most}; set "
                "train.precision=fp32, where rounding gives about 1e-6: more than that comes from other weights, "
                "positions or temperature in the sampler"
            )
