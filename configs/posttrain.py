"""What a post-training run is: SFT and GRPO, each the trainer's sections and a few of its own."""

from typing import Literal

from pydantic import Field, model_validator

from configs.base import Section
from configs.train import TrainerConfig


class InitConfig(Section):
    """The model to start from: a run directory, whose newest checkpoint is taken, and its tokenizer."""

    run: str
    tokenizer: str


class DialogueConfig(Section):
    """`dialogues` are files of JSON lines {"id", "messages": [{"role", "content"}]}, gzipped or not.

    A dialogue that is broken or longer than train.seq_length is set aside and counted; above `max_bad_share`
    the run stops. `heldout_share` of the dialogues, by hash of their first message, is never trained on.
    """

    dialogues: tuple[str, ...] = ()
    heldout_share: float = Field(default=0.05, ge=0, lt=1)
    max_bad_share: float = Field(default=0.05, ge=0, le=1)


class TaskConfig(Section):
    """A verifiable task. Prompts are split into training and held-out ones by hash, so the two never meet."""

    name: Literal["sort"] = "sort"
    digits: int = Field(default=6, ge=3, le=32)
    max_new_tokens: int = Field(default=16, ge=1)  # an answer that is not over by then is cut, and wrong
    # Held-out prompts on which the run's model is scored at the end, once greedily and once sampled.
    eval_prompts: int = Field(default=256, ge=1)


class DemonstrationConfig(TaskConfig):
    demonstrations: int = Field(default=20000, ge=0)  # solved training prompts among the dialogues


class GRPOSection(Section):
    """Each step samples `group_size` completions of train.global_batch_size / group_size prompts.

    `advantage` names the dialect, see posttrain.algorithms.advantages; `clip_high` above `clip_low` is DAPO's
    clip-higher.
    """

    group_size: int = Field(default=16, ge=2)
    temperature: float = Field(default=1.0, gt=0)
    advantage: Literal["grpo@trl", "grpo@verl", "grpo@nemo", "dr_grpo", "rloo"] = "grpo@trl"
    aggregation: Literal["token_mean", "sequence_mean", "fixed_length"] = "token_mean"
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.2, gt=0)
    dual_clip: float | None = Field(default=None, gt=1)
    # Rollout and trainer compute the same log-probabilities by different code. Before the first update their
    # mean absolute difference per token must be below this: fp32 gives about 1e-6, bf16 about 0.01.
    max_logprob_difference: float = Field(default=0.05, gt=0)


class SFTConfig(TrainerConfig):
    init: InitConfig
    data: DialogueConfig
    task: DemonstrationConfig | None = None

    @model_validator(mode="after")
    def _something_to_learn(self) -> "SFTConfig":
        if not self.data.dialogues and (self.task is None or self.task.demonstrations == 0):
            raise ValueError("nothing to train on: set data.dialogues, or task.demonstrations above 0")
        return self


class GRPOConfig(TrainerConfig):
    init: InitConfig
    task: TaskConfig
    grpo: GRPOSection = GRPOSection()

    @model_validator(mode="after")
    def _whole_groups(self) -> "GRPOConfig":
        batch, group = self.train.global_batch_size, self.grpo.group_size
        if batch % group:
            raise ValueError(
                f"train.global_batch_size = {batch} is not a multiple of grpo.group_size = {group}; "
                f"every prompt gets a whole group, so use {max(1, round(batch / group)) * group}"
            )
        return self
