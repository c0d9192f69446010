"""What a post-training run is: SFT and GRPO, each the trainer's sections and a few of its own."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.section import Section
from configs.train import TrainerConfig


class InitConfig(Section):
    """The model to start from: a run, or one of its checkpoints."""

    run: str | None = None
    """The folder of the run whose newest checkpoint is taken when training starts, and kept to when it goes on."""
    checkpoint: str | None = None
    """The checkpoint to take instead of a run's newest, e.g. RUN/checkpoints/step_100."""
    tokenizer: str | None = None
    """The folder of the tokenizer that the model was trained with; left out, it is the one that its run keeps."""

    @field_validator("*")
    @classmethod
    def _empty_is_left_out(cls, value: str | None) -> str | None:
        """So that an override can take back what a file says."""
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
    """Dialogues to learn from. One that is broken or longer than train.seq_length is set aside and counted."""

    dialogues: tuple[str, ...] = ()
    """The files, with a JSON object {"id", "messages": [{"role", "content"}]} on each line, gzipped or not."""
    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    """The share of the dialogues, by hash of their first message, that is never trained on."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """The share of the dialogues that may be broken or too long; above it the run stops."""


class TaskConfig(Section):
    """A verifiable task. Prompts are split into training and held-out ones by hash, so the two never meet."""

    name: Literal["sort"] = "sort"
    """Which task it is; sort asks for the digits of a number in ascending order."""
    digits: int = Field(default=6, ge=3, le=32)
    """The number of digits to sort."""
    max_new_tokens: int = Field(default=16, ge=1)
    """The most tokens of an answer; one that is not over by then is cut, and wrong."""
    eval_prompts: int = Field(default=256, ge=1)
    """The number of held-out prompts on which the model is scored at the end, once greedily and once sampled."""


class DemonstrationConfig(TaskConfig):
    """The task, and how many solved prompts of it are trained on."""

    demonstrations: int = Field(default=20000, ge=0)
    """The number of solved training prompts among the dialogues."""


class GRPOSection(Section):
    """Each step samples `group_size` completions of train.global_batch_size / group_size prompts."""

    group_size: int = Field(default=16, ge=2)
    """The number of completions of each prompt, whose rewards are compared; a divisor of train.global_batch_size."""
    temperature: float = Field(default=1.0, gt=0)
    """The temperature at which completions are sampled."""
    advantage: Literal["grpo@trl", "grpo@verl", "grpo@nemo", "dr_grpo", "rloo"] = "grpo@trl"
    """The formula from rewards to advantages; posttrain/algorithms/advantages.py writes each out."""
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    """How losses of tokens become one: a mean over tokens, of sequences' means, or over task.max_new_tokens each."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The probability ratio to the sampling policy is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The probability ratio is clipped above 1 + clip_high; more than clip_low is DAPO's clip-higher."""
    dual_clip: float | None = Field(default=None, gt=1)
    """The bound on a token's loss where its advantage A is negative, as -dual_clip * A; left out, there is none."""
    max_logprob_difference: float = Field(default=0.05, gt=0)
    """The mean difference of a token's log-probabilities in sampler and trainer that is allowed before the first step;
    the two compute them by different code: fp32 gives about 1e-6, bf16 about 0.01."""


class SFTConfig(TrainerConfig):
    """The root of a fine-tuning run's config."""

    init: InitConfig
    """The model to start from."""
    data: DialogueConfig
    """The dialogues to learn from."""
    task: DemonstrationConfig | None = None
    """A verifiable task, solved examples of which are learned too; left out, none are."""

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
    """How completions are sampled, compared and learned from."""
