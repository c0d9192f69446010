"""AdaLoRA (Zhang et al. 2023): low-rank adapters in the form of an SVD, which share a budget of ranks.

The added product is P diag(l) Q, with P [out, r] and Q [r, in] drawn at random and l [r] zero, so that the model begins
as its base. A penalty keeps the columns of P and the rows of Q orthonormal (equation 4). A triplet is an element of l
with its column of P and its row of Q. Its importance is the mean over its elements of sensitivity times uncertainty,
both smoothed over steps (equations 8 to 11); the least important ones of the whole model lose their l, until as many
are left as the budget allows, which falls with the cube of the time (equation 12).

Here are the layer and the formulas. `pretrain.parallel.rank_budget` applies them to a model split over ranks. The
smoothed numbers are parameters that get no gradient, so that checkpoints hold them in every layout.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from configs.adapters import AdapterConfig
from pretrain.model.adapters.low_rank import LowRank, parameter_like
from pretrain.model.layer_context import LayerContext
from pretrain.model.slices import Marks, mark, marks_of
from pretrain.model.tensor_parallel import ColumnLinear, RowLinear, WholeLinear

TRIPLET = ("a", "b", "lambdas")  # Q, P and l
STATE = ("sensitivity", "uncertainty")


class SVDLowRank(LowRank):
    """AdaLoRA's adapter of a linear layer: `a` is Q, `b` is P; `std` is the deviation of l's first values."""

    def __init__(
        self,
        layer: ColumnLinear | RowLinear | WholeLinear,
        name: str,
        config: AdapterConfig,
        context: LayerContext,
        std: float,
    ):
        split = marks_of(layer.weight).split
        size_out = split.size if split is not None and split.dim == 0 else len(layer.weight)
        super().__init__(layer, name, config, context, std=size_out**-0.5)
        # Where P is split each rank sees its own outputs alone, and so a part of l's gradient.
        marks = Marks(partial="heads" if marks_of(self.b).split else "sequence", decays=False)
        marks = replace(marks, std=std) if std else replace(marks, constant=0.0)
        self.lambdas = parameter_like(layer.weight, (config.rank,), marks)
        for of in TRIPLET:
            for state in STATE:
                self.register_parameter(f"{of}_{state}", _state(getattr(self, of), 0.0))
        self.kept = _state(self.lambdas, 1.0)  # 0 for triplets that have lost their l

    def added(self, y: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns the adapted output y + s P diag(l) z, of the layer's output y and the z = Q x that `reduced` gave."""
        return y + self.scale * F.linear(z * self.lambdas, self.b)


def _state(like: nn.Parameter, value: float) -> nn.Parameter:
    """Makes a parameter in fp32 and without gradient, of which a rank holds the same slice as of `like`."""
    parameter = nn.Parameter(torch.empty_like(like, dtype=torch.float32), requires_grad=False)
    mark(parameter, Marks(split=marks_of(like).split, constant=value, decays=False))
    return parameter


def smooth(sensitivity: torch.Tensor, uncertainty: torch.Tensor, now: torch.Tensor, beta: float) -> None:
    """Updates the smoothed sensitivity and uncertainty of a weight's elements in place (equations 9 and 10).

    `now` is the sensitivity of a single step, the absolute product of weight and gradient (equation 8).
    """
    sensitivity.lerp_(now, 1 - beta)
    uncertainty.lerp_((now - sensitivity).abs(), 1 - beta)


def budget(step: int, config: AdapterConfig) -> float:
    """Returns the mean number of triplets that a weight keeps after a step, counted from 1 (equation 12)."""
    first, last = config.warmup_steps, config.budget_steps
    left = min(1.0, max(0.0, 1 - (step - first) / (last - first)))
    return config.target_rank + (config.rank - config.target_rank) * left**3


def most_important(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Returns a mask of the `count` triplets with the highest scores, which are kept; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[order[:count]] = True
    return kept


def penalty(products: torch.Tensor) -> torch.Tensor:
    """Returns |V Vᵀ - I|², by which the rows of V miss being orthonormal, from V Vᵀ (equation 4)."""
    return (products - torch.eye(len(products), dtype=products.dtype, device=products.device)).square().sum()


def penalty_gradient(vectors: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of |V Vᵀ - I|² by the rows of V, of which this may be a part of the columns.

    `products` is V Vᵀ with all columns.
    """
    return 4 * (products - torch.eye(len(products), dtype=products.dtype, device=products.device)) @ vectors
