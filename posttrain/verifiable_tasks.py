"""Verifiable tasks: prompts drawn by key, answers checked by rule.

A task's prompts fall into a training and a held-out split by the hash of their content, so the two never
share one, however many are drawn. A verifier that cannot judge says so (`TaskScore.unscorable`): that is never a
reward of 0. Leaves out adapters to outside task collections.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from configs.posttrain import TaskConfig

Split = Literal["train", "heldout"]
HELDOUT_SHARE = 0.1  # of all prompts, by hash
LEAST_DIGITS, MOST_DIGITS = 3, 32


@dataclass(frozen=True)
class TaskScore:
    """A reward in [0, 1], or None where the verifier could not judge; `reason` is what a report counts by."""

    value: float | None
    reason: str

    @classmethod
    def unscorable(cls, reason: str) -> "TaskScore":
        return cls(None, reason)


class Task(Protocol):
    """`prompt` is a pure function of (seed, split, index)."""

    @property
    def name(self) -> str: ...

    @property
    def max_new_tokens(self) -> int:
        """An answer that is not over by then is cut, and wrong."""
        ...

    def prompt(self, seed: int, split: Split, index: int) -> str: ...

    def answer(self, prompt: str) -> str: ...

    def score(self, prompt: str, completion: str) -> TaskScore: ...

    def smaller(self) -> "Iterator[tuple[int, Task]]":
        """The same with every lower task.digits, from the highest on."""
        ...


@dataclass(frozen=True)
class SortTask:
    """Sort the digits of a number: "Sort 529143" -> "123459". Every digit is one token, so length is no
    obstacle.
    """

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
        """The one right completion. Errors: ValueError if `prompt` is not this task's."""
        match = re.fullmatch(r"Sort ([0-9]+)", prompt)
        if match is None:
            raise ValueError(f"prompt {prompt!r} is not of the form 'Sort DIGITS'")
        return "".join(sorted(match[1]))

    def score(self, prompt: str, completion: str) -> TaskScore:
        """1 for the exact answer, else 0; unscorable only if the prompt itself is not this task's."""
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
    """The task that a config names."""
    match settings.name:
        case "sort":
            return SortTask(settings.digits, settings.max_new_tokens)


def split_of(content: str) -> Split:
    """The split a prompt's content belongs to, by SHA-256: the same on every machine and for every seed."""
    draw = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") / 2**64
    return "heldout" if draw < HELDOUT_SHARE else "train"


def _draw_digits(name: str, digits: int, seed: int, split: Split, index: int) -> str:
    generator = random.Random(f"{name}/{seed}/{split}/{index}")  # a string seed is hashed the same way everywhere
    while True:
        drawn = "".join(generator.choices("0123456789", k=digits))
        if split_of(f"{name}/{drawn}") == split:
            return drawn
