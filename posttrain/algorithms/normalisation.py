"""Normalisation over all tokens or samples of a step, also where they are spread over data-parallel ranks.

Mean and variance come from sums that ranks can add up (`Moments`), so a layout never changes them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of some numbers; those of several parts make those of the whole."""

    count: float
    mean: float
    squares: float

    @classmethod
    def of(cls, x: Tensor, mask: Tensor) -> "Moments":
        """Returns the moments of the numbers where `mask` (bool) is True."""
        kept = x.detach()[mask].double()
        if not kept.numel():
            return cls(0.0, 0.0, 0.0)
        mean = kept.mean()
        return cls(float(kept.numel()), float(mean), float((kept - mean).square().sum()))

    @classmethod
    def together(cls, parts: Iterable["Moments"]) -> "Moments":
        """Returns the moments of all parts' numbers (Chan et al. 1979, which does not cancel as sums of squares do)."""
        whole = cls(0.0, 0.0, 0.0)
        for part in parts:
            if part.count:
                count, apart = whole.count + part.count, part.mean - whole.mean
                squares = whole.squares + part.squares + apart**2 * whole.count * part.count / count
                whole = cls(count, whole.mean + apart * part.count / count, squares)
        return whole

    def variance(self, ddof: int = 1) -> float:
        """Returns the variance, with `ddof` subtracted from the count; 0 for too few numbers."""
        return self.squares / (self.count - ddof) if self.count > ddof else 0.0


def whiten(x: Tensor, mask: Tensor, moments: Moments | None = None, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """Returns (x - mean) / sqrt(variance + eps) where `mask` is True, and 0 elsewhere.

    `moments` are those of the whole step, left out where this is the whole. Equal numbers all become 0. TRL and verl
    take ddof 1; OpenRLHF and NeMo-RL take ddof 0.
    """
    moments = moments or Moments.of(x, mask)
    variance = moments.variance(ddof)
    # Deviations that are rounding errors must not be divided by a small epsilon into advantages.
    if variance <= 1e-14 * moments.mean**2:
        return torch.zeros_like(x)
    return torch.where(mask, (x - moments.mean) * (variance + eps) ** -0.5, 0.0)
