"""Config of rewards: what scores the completions of a task that is read from files."""

import re
from typing import Literal

from pydantic import Field, model_validator

from configs.section import Section

# The keys that each kind of reward has, beside kind and weight.
KEYS: dict[str, tuple[str, ...]] = {
    "exact": ("ignore_case",),
    "regex": ("pattern", "ignore_case", "seconds"),
    "expression": (),
    "script": (),
    "math_verify": ("seconds", "memory_mb"),
    "instructions": ("partial",),
    "reasoning_gym": ("seconds", "memory_mb"),
    "tests": ("seconds", "memory_mb", "partial"),
    "function": ("function", "seconds", "memory_mb"),
    "reward_model": ("model",),
}
NEEDED = {"regex": "pattern", "function": "function", "reward_model": "model"}


class RewardConfig(Section):
    """One reward of a task. Its value is multiplied by `weight` and added to those of the task's other rewards."""

    kind: Literal[
        "exact",
        "regex",
        "expression",
        "script",
        "math_verify",
        "instructions",
        "reasoning_gym",
        "tests",
        "function",
        "reward_model",
    ] = "exact"
    """The rule: equal text, a pattern, another expression of the answer's digits with its value, the share of letters
    in one script, equal mathematics, checkable instructions, a scorer of reasoning-gym, unit tests in a sandbox, a
    Python function of yours, or a trained reward model."""
    weight: float = 1.0
    """The factor of this reward in the sum; below 0 it is a penalty, and at 0 it is measured and does nothing else."""
    after: str = ""
    """The text that ends the reasoning, such as "</think>": the reward sees what follows its last occurrence, and a
    completion without it gets 0; left out, the reward sees the whole completion."""
    ignore_case: bool = False
    """Whether upper and lower case are the same (exact, regex)."""
    pattern: str | None = None
    """The pattern: with a group, the group's last match is compared with the answer; without one, the whole completion
    must match it (regex)."""
    function: str | None = None
    """The function as module:function; it takes (prompt, completion, answer, metadata) and returns a number, or None if
    it cannot judge (function)."""
    model: str | None = None
    """The run or folder of a reward model (reward_model)."""
    seconds: float = Field(default=5.0, gt=0)
    """The time for one completion, in seconds; beyond it the completion is unscorable, or has failed its tests."""
    memory_mb: int = Field(default=4096, ge=64)
    """The address space of the process that judges, in MiB (math_verify, reasoning_gym, tests, function)."""
    partial: bool = False
    """Whether the reward is the share of instructions or tests that hold, and not 1 only if all do."""

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> "RewardConfig":
        known = ("kind", "weight", "after", *KEYS[self.kind])
        for key in type(self).model_fields:
            if key not in known and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} = {getattr(self, key)!r} says nothing of kind {self.kind!r}; leave it out")
        needed = NEEDED.get(self.kind)
        if needed and not getattr(self, needed):
            raise ValueError(f"kind = {self.kind!r} needs {needed}; set {needed} as well")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"pattern = {self.pattern!r} is no regular expression of Python: {error}; correct it"
                ) from None
        if self.function is not None and not re.fullmatch(r"[\w.]+:[\w.]+", self.function):
            raise ValueError(
                f"function = {self.function!r} is not of the form module:function; write it so, as in my_rewards:judge"
            )
        return self
