"""The parts of a task: problems, attempts at them, and scores. A task is anything that has the methods of `Task`.

A problem belongs to the training or the held-out split by a hash of its content, so the splits never share a prompt. A
reward that cannot judge an attempt returns `TaskScore.unscorable`, which is not a reward of 0.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from posttrain.chat.messages import Message

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 0.1  # of all problems of a generated task


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
        """Returns the score for a number, which is unscorable if it is infinite or no number."""
        if not math.isfinite(value):
            return cls.unscorable(f"returned {value}")
        return cls(float(value), reason or ("right" if value == 1 else "wrong" if value == 0 else "scored"))


class Task(Protocol):
    """A task; `problem` is a pure function of (seed, split, index)."""

    @property
    def name(self) -> str: ...

    @property
    def max_new_tokens(self) -> int:
        """Maximum length of a completion, in tokens; a longer one is cut and counts as wrong."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """JSON values that decide which problems there are; a run that continues must have the same."""
        ...

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The names that `TaskScore.parts` may have, for logs; () if there is but one reward."""
        ...

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weights, by name, of the rewards whose weighted sum is a score; {} if there is but one reward."""
        ...

    def size(self, split: Split) -> int | None:
        """Returns the number of problems of a split, or None if they are drawn without end."""
        ...

    def problem(self, seed: int, split: Split, index: int) -> Problem:
        """Returns problem number `index` of a split; an index of `size` or more comes back to earlier problems."""
        ...

    def score(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        """Returns the score of each attempt. It never raises for what a model wrote, and never waits without end."""
        ...

    def smaller(self) -> "Iterator[tuple[int, Task]]":
        """Yields (digits, the task with that task.digits) for every lower value of the key, highest first."""
        ...


def split_of(content: str, heldout_share: float = HELDOUT_SHARE) -> Split:
    """Returns the split of a problem's content, by its SHA-256: the same on every machine and for every seed."""
    return "heldout" if fraction(content) < heldout_share else "train"


def fraction(content: str) -> float:
    """Returns a number in [0, 1) that depends on the content alone."""
    return int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def available(task: Task, split: Split, wanted: int) -> int:
    """Returns `wanted`, or the number of problems that the split has, if these are fewer."""
    size = task.size(split)
    return wanted if size is None else min(wanted, size)


def truncated(task: Task, problem: Problem) -> TaskScore:
    """Returns the score of a completion that was cut before it closed its turn: 0 by every reward of its task."""
    own = [name for name in task.reward_names if problem.task in (task.name, name.split("/")[0])]
    return TaskScore(0.0, "truncated", dict.fromkeys(own, 0.0))
