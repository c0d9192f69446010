"""Input and output of a reward: a problem, an attempt at it by the model, and the score of the attempt.

A reward that cannot judge an attempt returns `TaskScore.unscorable`, which is not a reward of 0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.chat.messages import Message

LARGEST = 1e15  # rewards are squared and summed in fp32, which ends at 3e38


@dataclass(frozen=True)
class Problem:
    """A prompt and all that its rewards need.

    `prompt` is a text or a list of messages, as the task's author wrote it. `answer` is what rewards compare with.
    `solution` is a completion that is right, and `demonstration` the completion that fine-tuning teaches; each is None
    if the task has none. `metadata` are the other keys of the record.
    """

    id: str
    prompt: str | Sequence[Message]
    answer: Any = None
    solution: str | None = None
    demonstration: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""
    system: str = ""

    @property
    def messages(self) -> list[Message]:
        """The messages that the model answers; the last one is the user's."""
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        if isinstance(self.prompt, str):
            return [*first, {"role": "user", "content": self.prompt}]
        return [*first, *self.prompt]


@dataclass(frozen=True)
class Attempt:
    """A problem and the text that the model wrote for it, up to where it closed its turn."""

    problem: Problem
    completion: str


@dataclass(frozen=True)
class TaskScore:
    """A reward, or None if the attempt could not be judged; reports count by `reason`, which names no single attempt.

    Rules give 0 to 1; a reward model or a function of the user gives any finite number. `parts` has the value of each
    reward by name, before weights. `detail` says more of this attempt than `reason`.
    """

    value: float | None
    reason: str
    parts: Mapping[str, float] = field(default_factory=dict)
    detail: str = field(default="", compare=False)

    @classmethod
    def unscorable(cls, reason: str, detail: str = "") -> "TaskScore":
        """Returns the score of an attempt that cannot be judged."""
        return cls(None, reason, detail=detail)

    @classmethod
    def of(cls, value: float, reason: str = "") -> "TaskScore":
        """Returns the score for a number, which is unscorable if it is infinite, too large or no number."""
        if not math.isfinite(value):
            return cls.unscorable(f"returned {value}")
        if abs(value) > LARGEST:
            return cls.unscorable(f"returned {value:g}, beyond {LARGEST:g}")
        return cls(float(value), reason or ("right" if value == 1 else "wrong" if value == 0 else "scored"))
