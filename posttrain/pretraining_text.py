"""Rows of pretraining text, of a data plan, which fine-tuning and PPO train on beside their own.

The rows are those of the plan's samples in order, and come round again when all were used.
"""

from dataclasses import dataclass
from pathlib import Path

from configs.loader import ConfigError
from data_pipeline.core.integrity import DamagedData
from data_pipeline.mixture.earlier import find
from data_pipeline.mixture.rows import Plan, Row
from pretrain.checkpoint import storage
from pretrain.run.initial_model import InitialModel


@dataclass(frozen=True)
class PretrainingText:
    """The rows of a plan; `key` is the config key that names it, for messages."""

    plan: Plan
    key: str

    @classmethod
    def open(cls, location: str, key: str, initial: InitialModel, seq_length: int) -> "PretrainingText":
        """Opens the plan at `location`; for a run that goes on, its own plan if a later data run moved that aside.

        Raises ConfigError if there is none, or its tokenizer or the length of its rows is another.
        """
        state = {} if initial.own is None else storage.read_manifest(initial.own).get("source", {})
        wanted = state.get("text_plan")
        try:
            plan = (find(location, wanted) if wanted else None) or Plan.open(Path(location))
        except DamagedData:
            raise
        except (ValueError, OSError) as error:
            raise ConfigError(f"{key} = {location!r}: {str(error).replace('data.plan', key)}") from None
        initial.check_plan(location, plan, key)
        if plan.seq_length != seq_length:
            other = "" if initial.continues else f", or set train.seq_length={plan.seq_length}"
            raise ConfigError(
                f"{key} has rows of {plan.seq_length} tokens, and train.seq_length = {seq_length}; make a plan with "
                f"mixture.seq_length={seq_length}{other}"
            )
        return cls(plan, key)

    def row(self, number: int) -> Row:
        """Returns a row, counted from 0 through all passes over the plan."""
        return self.plan.row(number % self.plan.num_samples)
