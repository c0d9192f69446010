"""Training rows of a rollout's samples: one row for each, with what the loss needs of every token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.mixture.rows import Row
from posttrain.rl.rollout import Rollout


@dataclass(frozen=True)
class RolloutRow(Row):
    """Training row of a prompt and its completion. `loss_mask` is float32: the weight of each completion token.

    `extra` has further arrays, float32 [L] by name, aligned with labels and 0 outside the completion.
    """

    extra: Mapping[str, np.ndarray] = field(default_factory=dict)


def rollout_rows(
    rollout: Rollout, samples: Sequence[int], weights: np.ndarray | None = None, extra: Sequence[str] = ()
) -> list[RolloutRow]:
    """Returns the rows of some samples; tokens of sample i have weight `weights[i]`, or 1.

    `extra` names the arrays of the rollout that rows have beside labels.
    """
    positions = np.arange(rollout.tokens.shape[1], dtype=np.int64)
    found = []
    for i in samples:
        real = positions < rollout.lengths[i]
        weight = np.float32(1.0 if weights is None else weights[i])
        row = RolloutRow(
            tokens=rollout.tokens[i].astype(np.int64),
            labels=rollout.labels[i].astype(np.int64),
            loss_mask=np.where(rollout.mask[i], weight, np.float32(0)),
            positions=np.where(real, positions, 0),
            segments=np.where(real, 0, -1),
            source=0,
            extra={name: np.where(rollout.mask[i], rollout.arrays[name][i], np.float32(0)) for name in extra},
        )
        found.append(row)
    return found
