"""Configs of reinforcement-learning runs (GRPO): the sections of all training runs, sampling and loss."""

from typing import Literal

from pydantic import Field

from configs.initial import InitConfig
from configs.section import Section
from configs.tasks import TaskConfig
from configs.train import TrainerConfig


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


class GRPOConfig(TrainerConfig):
    """The root of a reinforcement-learning run's config."""

    init: InitConfig
    """The model to start from."""
    task: TaskConfig
    """The task whose answers are rewarded."""
    grpo: GRPOSection = GRPOSection()
    """Sampling and loss."""
