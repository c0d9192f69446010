"""Verifiable tasks, whose answers are scored by a rule."""

from typing import Literal

from pydantic import Field

from configs.section import Section


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
