"""Rows of pretraining text that are trained on in the same steps as rollouts (PPO-ptx, Ouyang et al. 2022, eq. 2).

The trainer divides the weighted sum of all losses of a step by the sum of all weights. So that the loss of rollouts and
that of text are each a mean over their own tokens, rows have factors: the whole weight over that of their kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.mixture.rows import Row
from posttrain.pretraining_text import PretrainingText
from posttrain.rl.policy_loss import PTX
from posttrain.rl.rollout_rows import RolloutRow


@dataclass(frozen=True)
class TextRows:
    """The text of each step: `count` rows of a plan."""

    text: PretrainingText
    count: int
    coef: float

    def of_step(self, step: int) -> list[Row]:
        """Returns the rows of a step, counted from 0."""
        return [self.text.row(i) for i in range(step * self.count, (step + 1) * self.count)]

    def rows(
        self, text: Sequence[Row], names: Sequence[str], whole: float, experts: np.ndarray | None = None
    ) -> list[RolloutRow]:
        """Returns rows with the arrays `names` that rollouts have; `whole` is the step's whole weight.

        `experts` are the choices of routers that a rollout's row has, if any: here the routers choose by themselves.
        """
        no_choices = None if experts is None else np.full_like(experts, -1)
        own = sum(float(row.loss_mask.sum()) for row in text)
        factors = {"factor": self.coef * whole / max(own, 1.0), "text_factor": whole / max(own, 1.0)}
        return [
            RolloutRow(
                row.tokens,
                row.labels,
                row.loss_mask.astype(np.float32),
                row.positions,
                row.segments,
                PTX,
                {name: np.full(len(row.tokens), factors.get(name, 0.0), np.float32) for name in names},
                no_choices,
            )
            for row in text
        ]
