"""The check that sampler and trainer, which are different code, agree on the policy before it is first updated."""

import torch

from configs.loader import Failure


class LogprobCheck:
    """Raises Failure if log-probabilities differ by more than `most` nats a token on average, the value of `key`.

    Only the first call of a process checks: if the two differ before the first update, the probability ratio would
    measure a difference in code, not in policy.
    """

    def __init__(self, most: float, key: str = "grpo.max_logprob_difference") -> None:
        self._most, self._key, self._done = most, key, False

    def __call__(self, difference: torch.Tensor, weights: torch.Tensor) -> None:
        """Checks absolute differences, of tokens that are weighted by `weights`."""
        if self._done:
            return
        self._done = True
        mean = float((difference * weights).sum() / weights.sum().clamp(min=1e-12))
        if not mean <= self._most:
            raise Failure(
                f"before the first update, log-probabilities of sampler and trainer differ by {mean:.4g} nats a token "
                f"(at most {float(difference.max()):.4g}), above {self._key} = {self._most}; set "
                "train.precision=fp32, where rounding gives about 1e-6: more than that comes from other weights, "
                "positions or temperature in the sampler"
            )
