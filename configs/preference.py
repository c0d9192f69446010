"""Configs of preference runs (DPO and kin): the sections of all training runs, preferences, and the loss."""

from typing import Literal

from pydantic import Field, model_validator

from configs.initial import InitConfig
from configs.section import Section
from configs.tasks import TaskConfig
from configs.train import TrainerConfig

WITHOUT_REFERENCE = ("orpo", "simpo")
SMOOTHED = ("conservative", "robust")


class PreferenceData(Section):
    """Preferences to learn from. One that is broken or does not fit a row is set aside and counted."""

    pairs: tuple[str, ...] = Field(min_length=1)
    """The files, JSON lines (.gz or .zst too) or parquet, of records with prompt, chosen and rejected, each a text or a
    list of messages; for preference.loss = kto with prompt, completion and label, true or false."""
    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    """The share of the records, by hash of their prompt, that is never trained on."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """The share of the records that may be set aside; above it the run stops with an error."""


class OnlineSection(Section):
    """Pairs of completions that the model in training writes for the prompts of the task, judged by its rewards."""

    completions: int = Field(default=2, ge=2)
    """The completions of each prompt: that of the highest score is chosen, and that of the lowest rejected."""
    temperature: float = Field(default=1.0, gt=0)
    """The temperature at which completions are sampled."""
    max_draws: int = Field(default=4, ge=1)
    """How often the prompts of a step may be drawn to replace those whose completions all score the same; pairs that a
    step still lacks then have no weight in its loss."""
    sampler: Literal["whole", "split"] = "whole"
    """How weights come to sampling: each rank gathers a whole copy, or ranks of tp and ep sample with their slices."""


class PreferenceSection(Section):
    """The loss; posttrain/preference/preference_losses.py writes out each formula."""

    loss: Literal["dpo", "conservative", "robust", "ipo", "ipo_mean", "hinge", "orpo", "simpo", "kto"] = "dpo"
    """The formula; ipo takes log-probabilities of whole answers, ipo_mean those per token."""
    beta: float = Field(default=0.1, gt=0)
    """The factor on log-ratios (rewards), which holds the model near the reference; in orpo the odds ratio's weight."""
    smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    """conservative, robust: the share of pairs whose label is wrong."""
    margin: float = Field(default=1.0, ge=0)
    """simpo: the reward margin that is aimed at, gamma."""
    sft_weight: float = Field(default=0.0, ge=0)
    """The weight of the chosen answer's mean negative log-probability a token, added to a loss of pairs; 0 is off."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """kto: the weight of desirable completions."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """kto: the weight of undesirable completions."""

    @property
    def has_reference(self) -> bool:
        """True if the loss compares the model with the one that the run began from."""
        return self.loss not in WITHOUT_REFERENCE

    @model_validator(mode="after")
    def _keys_fit_the_loss(self) -> "PreferenceSection":
        of = {
            "smoothing": SMOOTHED,
            "margin": ("simpo",),
            "desirable_weight": ("kto",),
            "undesirable_weight": ("kto",),
        }
        for key, losses in of.items():
            default = type(self).model_fields[key].default
            if getattr(self, key) != default and self.loss not in losses:
                raise ValueError(
                    f"preference.{key} is a number of {' and '.join(losses)}, and preference.loss = {self.loss!r}; "
                    "leave it out, or choose such a loss"
                )
        if self.sft_weight and self.loss == "kto":
            raise ValueError("preference.sft_weight needs a chosen answer, which kto has not; leave it out")
        return self


class PreferenceConfig(TrainerConfig):
    """The root of a preference run's config."""

    init: InitConfig
    """The model to start from, which is also the reference."""
    data: PreferenceData | None = None
    """The preferences to learn from; left out, the model writes its own, see `online`."""
    preference: PreferenceSection = PreferenceSection()
    """The loss."""
    online: OnlineSection | None = None
    """Pairs of completions that the model in training writes, in place of `data`."""
    task: TaskConfig | None = None
    """The task whose prompts are answered and whose rewards judge the answers (online)."""

    @model_validator(mode="after")
    def _preferences_have_one_origin(self) -> "PreferenceConfig":
        if (self.data is None) == (self.online is None):
            given = "neither is set" if self.data is None else "both are set"
            raise ValueError(
                f"preferences come from data.pairs, or from [online] and [task], and {given}; set one of the two"
            )
        if (self.online is None) != (self.task is None):
            raise ValueError(
                "[online] and [task] belong together: the task has the prompts and rewards of online pairs; set both, "
                "or leave out both"
            )
        if self.online and self.preference.loss == "kto":
            raise ValueError(
                "preference.loss = 'kto' learns from single completions, and [online] makes pairs; choose another loss"
            )
        if self.task and not self.task.is_scored:
            raise ValueError(
                "[online] needs scores, and task.answer_key = '' without task.rewards gives none; set task.answer_key, "
                "or name rewards"
            )
        return self

    @model_validator(mode="after")
    def _answers_stay_whole(self) -> "PreferenceConfig":
        if self.parallel.cp > 1:
            raise ValueError(
                f"parallel.cp = {self.parallel.cp} splits rows, and both answers of a pair must be on one rank; set "
                "parallel.cp=1, and parallel.tp with parallel.sp=true for long dialogues"
            )
        return self
