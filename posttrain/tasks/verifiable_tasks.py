"""Verifiable tasks, whose prompts are generated and whose answers are checked by a rule.

A prompt belongs to the training or the held-out split by the hash of its content, so the splits never share a prompt.
A verifier that cannot judge an answer returns `TaskScore.unscorable`, which is not a reward of 0.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from configs.tasks import TaskConfig

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 0.1  # of all prompts
LEAST_DIGITS, MOST_DIGITS = 3, 32


@dataclass(frozen=True)
class TaskScore:
    """A reward in [0, 1], or None if the verifier could not judge; reports count by `reason`."""

    value: float | None
    reason: str

    @classmethod
    def unscorable(cls, reason: str) -> "TaskScore":
        """Returns the score of an answer that the verifier cannot judge."""
        return cls(None, reason)


class Task(Protocol):
    """A task with generated prompts; `prompt` is a pure function of (seed, split, index)."""

    @property
    def name(self) -> str: ...

    @property
    def max_new_tokens(self) -> int:
        """Maximum length of an answer, in tokens; a longer one is cut and counts as wrong."""
        ...

    def prompt(self, seed: int, split: Split, index: int) -> str:
        """Returns prompt number `index` of a split."""
        ...

    def answer(self, prompt: str) -> str:
        """Returns the right answer to a prompt."""
        ...

    def score(self, prompt: str, completion: str) -> TaskScore:
        """Returns the reward of a completion."""
        ...

    def smaller(self) -> "Iterator[tuple[int, Task]]":
        """Yields (digits, the same task with so many digits) for every lower task.digits, highest first."""
        ...


@dataclass(frozen=True)
class SortTask:
    """Task of sorting the digits of a number: "Sort 529143" -> "123459". Every digit is one token."""

    digits: int = 6
    max_new_tokens: int = 16
    name: str = "sort"

    def __post_init__(self) -> None:
        if not LEAST_DIGITS <= self.digits <= MOST_DIGITS:
            raise ValueError(
                f"task.digits = {self.digits} is outside {LEAST_DIGITS} to {MOST_DIGITS}; six is what a tiny model can "
                "learn"
            )

    def prompt(self, seed: int, split: Split, index: int) -> str:
        return f"Sort {_draw_digits(self.name, self.digits, seed, split, index)}"

    def answer(self, prompt: str) -> str:
        """Returns the only right completion. Raises ValueError if `prompt` is not one of this task."""
        match = re.fullmatch(r"Sort ([0-9]+)", prompt)
        if match is None:
            raise ValueError(f"prompt {prompt!r} is not of the form 'Sort DIGITS'")
        return "".join(sorted(match[1]))

    def score(self, prompt: str, completion: str) -> TaskScore:
        """Returns 1 for the exact answer, else 0; unscorable if the prompt is not one of this task."""
        try:
            answer = self.answer(prompt)
        except ValueError as error:
            return TaskScore.unscorable(str(error))
        if completion == answer:
            return TaskScore(1.0, "right")
        if not re.fullmatch(r"[0-9]+", completion):
            return TaskScore(0.0, "not a number")
        return TaskScore(0.0, "wrong digits" if sorted(completion) != list(answer) else "wrong order")

    def smaller(self) -> Iterator[tuple[int, Task]]:
        for digits in range(self.digits - 1, LEAST_DIGITS - 1, -1):
            yield digits, replace(self, digits=digits)


def make_task(settings: TaskConfig) -> Task:
    """Returns the task that a config names."""
    match settings.name:
        case "sort":
            return SortTask(settings.digits, settings.max_new_tokens)


def split_of(content: str) -> Split:
    """Returns the split of a prompt's content, by its SHA-256: the same on every machine and for every seed."""
    draw = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64
    return "heldout" if draw < HELDOUT_SHARE else "train"


def _draw_digits(name: str, digits: int, seed: int, split: Split, index: int) -> str:
    generator = random.Random(f"{name}/{seed}/{split}/{index}")  # a string seed is hashed the same way everywhere
    while True:
        drawn = "".join(generator.choices("0123456789", k=digits))
        if split_of(f"{name}/{drawn}") == split:
            return drawn
