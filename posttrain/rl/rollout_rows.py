"""Training rows of a rollout's samples: one row for each, with what the loss needs of every token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from configs.loader import ConfigError
from configs.model import ModelConfig
from data_pipeline.mixture.rows import Row
from posttrain.rl.rollout import EXPERTS, Rollout


@dataclass(frozen=True)
class RolloutRow(Row):
    """Training row of a prompt and its completion. `loss_mask` is float32: the weight of each completion token.

    `extra` has further arrays, float32 [L] by name, aligned with labels and 0 outside the completion. `experts`, int16
    [L, layers, k], are those that the sampler's routers chose, see `pretrain.model.batch.Batch`.
    """

    extra: Mapping[str, np.ndarray] = field(default_factory=dict)
    experts: np.ndarray | None = None


def rollout_rows(
    rollout: Rollout,
    samples: Sequence[int],
    weights: np.ndarray | None = None,
    extra: Sequence[str] = (),
    replays_experts: bool = False,
) -> list[RolloutRow]:
    """Returns the rows of some samples; tokens of sample i have weight `weights[i]`, or 1.

    `extra` names the arrays of the rollout that rows have beside labels. With `replays_experts` they have the choices
    of routers, too, if the rollout has them: they are for the model that sampled it, and for no other.
    """
    positions = np.arange(rollout.tokens.shape[1], dtype=np.int64)
    experts = rollout.arrays.get(EXPERTS) if replays_experts else None
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
            experts=None if experts is None else experts[i],
        )
        found.append(row)
    return found


def check_experts(choices: np.ndarray, number: int, model: ModelConfig) -> None:
    """Raises ConfigError if the recorded choices of routers [N, S, L, k] cannot be those of `model`."""
    layers = sum(layer.moe is not None for layer in model.layers)
    have, experts = choices.shape[2:], 1 + int(choices.max(initial=-1))
    wanted = (layers, model.moe.top_k) if model.moe else (0, 0)
    if have != wanted or (model.moe and experts > model.moe.num_experts):
        raise ConfigError(
            f"rl.replay: rollout {number} has the choices of {have[1]} of at least {experts} experts in {have[0]} "
            f"layers, and the model chooses {wanted[1]} of {model.moe.num_experts if model.moe else 0} in {layers}; "
            "set rl.replay_experts=false, with which its routers choose by themselves"
        )
