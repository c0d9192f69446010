"""A second model in the train loop, such as the critic of PPO."""

from collections.abc import Sequence
from typing import Any, Protocol

from pretrain.model.batch import Batch
from pretrain.parallel.engine import Engine


class Companion(Protocol):
    """A second model that is trained beside the first, on the same batches, and saved in the same checkpoints."""

    name: str
    engine: Engine

    def begin(self) -> None:
        """Gives the model its first weights, in a new run. Collective."""

    def train_step(self, batches: Sequence[Batch], step: int) -> dict[str, Any]:
        """Trains on this rank's micro-batches of step `step`, counted from 0; returns values for the log."""
