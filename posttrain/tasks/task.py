"""Interface of tasks, which set problems and score attempts at them: any object with the methods of `Task` is one.

A problem belongs to the training or the held-out split by a hash of its content, so the splits never share a prompt.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

from posttrain.rewards.attempt import Attempt, Problem, TaskScore

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 0.1  # of all problems of a generated task


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
