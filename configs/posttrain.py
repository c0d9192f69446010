"""Configs of post-training runs (SFT, GRPO): the sections of all training runs and a few of their own."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.section import Section
from configs.train import TrainerConfig


class InitConfig(Section):
    """The model to start from: a run, or one of its checkpoints."""

    run: str | None = None
    """The folder of the run whose newest checkpoint is used; a run that continues keeps the one it started from."""
    checkpoint: str | None = None
    """The checkpoint to use in place of a run's newest, e.g. RUN/checkpoints/step_100."""
    tokenizer: str | None = None
    """The folder of the tokenizer that the model was trained with; left out, the one stored in its run."""

    @field_validator("*")
    @classmethod
    def _empty_is_left_out(cls, value: str | None) -> str | None:
        """Turns "" into None, so that an override can unset a key of the file."""
        return value or None

    @model_validator(mode="after")
    def _one_model(self) -> "InitConfig":
        if self.run and self.checkpoint:
            raise ValueError(
                f"init.run = {self.run!r} and init.checkpoint = {self.checkpoint!r} both name the model to start from; "
                "leave one out (as an override: init.run= or init.checkpoint=)"
            )
        if not self.run and not self.checkpoint:
            raise ValueError(
                "neither init.run nor init.checkpoint names the model to start from; set init.run=RUN for the newest "
                "checkpoint of a run, or init.checkpoint=RUN/checkpoints/step_N"
            )
        return self


class DialogueConfig(Section):
    """Dialogues to train on. One that is broken or longer than train.seq_length is set aside and counted."""

    dialogues: tuple[str, ...] = ()
    """The files, with a JSON object {"id", "messages": [{"role", "content"}]} on each line, gzipped or not."""
    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    """The share of the dialogues, by hash of their first message, that is never trained on."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """The share of the dialogues that may be broken or too long; above it the run stops with an error."""


class TaskConfig(Section):
    """A verifiable task. Prompts are divided by hash into training and held-out ones, which never overlap."""

    name: Literal["sort"] = "sort"
    """Which task it is; sort asks for the digits of a number in ascending order."""
    digits: int = Field(default=6, ge=3, le=32)
    """The number of digits to sort."""
    max_new_tokens: int = Field(default=16, ge=1)
    """The maximum length of an answer, in tokens; one that is longer is cut and counts as wrong."""
    eval_prompts: int = Field(default=256, ge=1)
    """The number of held-out prompts on which the model is scored at the end, once greedily and once sampled."""


class DemonstrationConfig(TaskConfig):
    """A verifiable task, and the number of solved prompts to train on."""

    demonstrations: int = Field(default=20000, ge=0)
    """The number of solved training prompts among the dialogues."""


class GRPOSection(Section):
    """Sampling and loss: each step samples group_size completions of train.global_batch_size / group_size prompts."""

    group_size: int = Field(default=16, ge=2)
    """The number of completions of each prompt, whose rewards are compared; a divisor of train.global_batch_size."""
    temperature: float = Field(default=1.0, gt=0)
    """The temperature at which completions are sampled."""
    advantage: Literal["grpo@trl", "grpo@verl", "grpo@nemo", "dr_grpo", "rloo"] = "grpo@trl"
    """The formula from rewards to advantages; posttrain/algorithms/advantages.py has each of them."""
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """The average of token losses: over all tokens, over completions' own means, or over task.max_new_tokens each."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The lower bound of the probability ratio to the sampling policy is 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The upper bound of the probability ratio is 1 + clip_high; more than clip_low is DAPO's clip-higher."""
    dual_clip: float | None = Field(default=None, gt=1)
    """The bound on a token's loss where its advantage A is negative, as -dual_clip * A; left out, there is none."""
    max_logprob_difference: float = Field(default=0.05, gt=0)
    """The maximum mean difference, in nats a token, between the log-probabilities that sampler and trainer compute, by
    different code, before the first step; fp32 gives about 1e-6, bf16 about 0.01."""


class SFTConfig(TrainerConfig):
    """The root of a fine-tuning run's config."""

    init: InitConfig
    """The model to start from."""
    data: DialogueConfig
    """The dialogues to train on."""
    task: DemonstrationConfig | None = None
    """A verifiable task whose solved prompts are trained on too; left out, there is none."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> "SFTConfig":
        if not self.data.dialogues and (self.task is None or self.task.demonstrations == 0):
            raise ValueError("nothing to train on: set data.dialogues, or task.demonstrations above 0")
        return self


class GRPOConfig(TrainerConfig):
    """The root of a reinforcement-learning run's config."""

    init: InitConfig
    """The model to start from."""
    task: TaskConfig
    """The task whose answers are rewarded."""
    grpo: GRPOSection = GRPOSection()
    """Sampling and loss."""
