"""The task of sorting digits, whose problems are drawn without end."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.tasks.digit_task import DigitTask
from posttrain.tasks.task import Split, split_of


@dataclass(frozen=True)
class SortTask(DigitTask):
    """Task of sorting the digits of a number: "Sort 529143" -> "123459". Every digit is one token."""

    least_digits = 3
    most_digits = 32
    advice = "; six is what a tiny model can learn"

    digits: int = 6
    max_new_tokens: int = 16
    name: str = "sort"

    def problem(self, seed: int, split: Split, index: int) -> Problem:
        drawn = self._draw_digits(seed, split, index)
        answer = "".join(sorted(drawn))
        return Problem(f"{self.name}/{drawn}", f"Sort {drawn}", answer, answer, answer, task=self.name)

    def score(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        """Returns 1 for each exact answer, else 0; unscorable if the prompt is not one of this task."""
        return [self._score(attempt.problem, attempt.completion) for attempt in attempts]

    def _score(self, problem: Problem, completion: str) -> TaskScore:
        match = re.fullmatch(r"Sort ([0-9]+)", str(problem.prompt))
        if match is None:
            return TaskScore.unscorable("not a prompt of this task", f"{problem.prompt!r} is not 'Sort DIGITS'")
        answer = "".join(sorted(match[1]))
        if completion == answer:
            return TaskScore(1.0, "right")
        if not re.fullmatch(r"[0-9]+", completion):
            return TaskScore(0.0, "not a number")
        return TaskScore(0.0, "wrong digits" if sorted(completion) != list(answer) else "wrong order")

    def _draw_digits(self, seed: int, split: Split, index: int) -> str:
        # A string seed is hashed the same way everywhere.
        generator = random.Random(f"{self.name}/{seed}/{split}/{index}")
        while True:
            drawn = "".join(generator.choices("0123456789", k=self.digits))
            if split_of(f"{self.name}/{drawn}") == split:
                return drawn
