"""Configs of fine-tuning runs (SFT): the sections of all training runs, and dialogues."""

from pydantic import Field, model_validator

from configs.initial import InitConfig
from configs.section import Section
from configs.tasks import DemonstrationConfig
from configs.train import TrainerConfig


class DialogueConfig(Section):
    """Dialogues to train on. One that is broken or longer than train.seq_length is set aside and counted."""

    dialogues: tuple[str, ...] = ()
    """The files or globs, JSON lines (.gz or .zst too) or parquet, whose records have "messages", a list of {"role",
    "content"}, or "prompt" and "completion", each a text or such a list."""
    chat_template: str | None = None
    """A file with the Jinja template to write dialogues with; left out, the model's own, or else Trivium's."""
    thinking_switches: bool = False
    """Whether dialogues without a switch get /think or /no_think in the user's message before an answer with or without
    reasoning, so that the model learns to follow it; answers without reasoning get an empty thinking block."""
    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    """The share of the dialogues, by hash of their first message, that is never trained on."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """The share of the dialogues that may be broken or too long; above it the run stops with an error."""


class FineTuningData(DialogueConfig):
    """Dialogues to train on, and text of pretraining beside them, so that the model does not forget how to write it."""

    text_plan: str | None = None
    """The folder of a data plan whose rows, as long as train.seq_length, are trained on beside the dialogues."""
    text_weight: float = Field(default=0.0, ge=0, lt=1)
    """The share of all rows that are text of text_plan; each of their tokens counts in the loss as one of an answer."""

    @model_validator(mode="after")
    def _text_has_weight(self) -> "FineTuningData":
        if (self.text_plan is None) != (self.text_weight == 0):
            raise ValueError(
                f"data.text_plan = {self.text_plan!r} and data.text_weight = {self.text_weight} belong together; set "
                "both, or leave out both"
            )
        return self


class SFTConfig(TrainerConfig):
    """The root of a fine-tuning run's config."""

    init: InitConfig
    """The model to start from."""
    data: FineTuningData
    """The dialogues to train on."""
    task: DemonstrationConfig | None = None
    """A verifiable task whose solved prompts are trained on too; left out, there is none."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> "SFTConfig":
        if not self.data.dialogues and (self.task is None or self.task.demonstrations == 0):
            raise ValueError("nothing to train on: set data.dialogues, or task.demonstrations above 0")
        return self
