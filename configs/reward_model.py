"""Configs of reward models: the sections of all training runs, the examples, and the values that the model learns."""

from typing import Literal

from pydantic import Field, model_validator

from configs.initial import InitConfig
from configs.section import Section
from configs.train import TrainerConfig

JUDGEMENTS = ("wrong", "right")  # the classes of reasoning steps where a config names none


class ExamplesConfig(Section):
    """Examples to learn from. One that is broken or does not fit a row is set aside and counted."""

    files: tuple[str, ...] = Field(min_length=1)
    """The files, JSON lines (.gz or .zst too) or parquet: pairs, judged steps or texts, as reward_model.kind says."""
    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    """The share of the examples, by hash of their prompt, that is never trained on."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """The share of the examples that may be set aside; above it the run stops with an error."""


class RewardSection(Section):
    """The values that the model gives, and how it learns them."""

    kind: Literal["preference", "process", "classification"] = "preference"
    """One reward of a dialogue from pairs (Bradley-Terry), a class of each reasoning step, or a class of each text."""
    margin: float = Field(default=0.0, ge=0)
    """preference: the margin of a pair that names none; the chosen side's reward is to be higher by more than it."""
    centring: float = Field(default=0.0, ge=0)
    """preference: the factor on the squared sum of a pair's rewards, which keeps rewards near zero; 0 turns it off."""
    labels: tuple[str, ...] = ()
    """process, classification: the names of the classes, in order; left out, steps are wrong or right."""
    separator: str = Field(default="\n", min_length=1)
    """process: the text that ends each step, on whose last token the step is judged."""

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> "RewardSection":
        if self.kind == "preference" and self.labels:
            raise ValueError("reward_model.labels names classes, and pairs have none; leave it out")
        if self.kind != "preference" and (self.margin or self.centring):
            raise ValueError(
                f"reward_model.margin and centring are for pairs, and reward_model.kind = {self.kind!r}; leave them out"
            )
        if self.kind == "classification" and not self.labels:
            raise ValueError(
                'reward_model.kind = \'classification\' needs reward_model.labels, for example ["bad", "good"]'
            )
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(
                f"reward_model.labels = {list(self.labels)} are not two or more different names; correct them"
            )
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; none for a preference model."""
        return self.labels or (JUDGEMENTS if self.kind == "process" else ())

    @property
    def outputs(self) -> int:
        """The number of values that the model gives."""
        return len(self.classes) or 1


class RewardModelConfig(TrainerConfig):
    """The root of a reward model's config."""

    init: InitConfig
    """The model to start from."""
    data: ExamplesConfig
    """The examples to learn from."""
    reward_model: RewardSection = RewardSection()
    """The values that the model gives, and how it learns them."""

    @model_validator(mode="after")
    def _pairs_stay_together(self) -> "RewardModelConfig":
        if self.reward_model.kind == "preference" and self.parallel.cp > 1:
            raise ValueError(
                f"parallel.cp = {self.parallel.cp} splits rows, and both sides of a pair must be on one rank; set "
                "parallel.cp=1, and parallel.tp with parallel.sp=true for long dialogues"
            )
        return self
