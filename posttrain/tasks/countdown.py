"""The countdown task: make a number from given digits, each used once, with +, - and *.

It is the task of TinyZero (github.com/Jiayi-Pan/TinyZero) in small, and shows what rewards alone can teach: the
demonstrations for fine-tuning have the right form and the right digits, but a result left to chance.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.rewards.expression import value_of
from posttrain.tasks.digit_task import DigitTask
from posttrain.tasks.task import Split, split_of


@dataclass(frozen=True)
class CountdownTask(DigitTask):
    """Task of making a number from digits: "Make 22 of 3 5 7" -> "3*5+7".

    Digits are 1 to 9. The number is that of a random expression of the digits, at least 0, so there is a solution.
    Reward is 1 for an expression that uses each digit once and makes the number, else 0; parentheses are allowed.
    """

    least_digits = 3
    most_digits = 6
    advice = " for the task countdown; three is what a tiny model can learn"

    digits: int = 3
    max_new_tokens: int = 16
    name: str = "countdown"

    def problem(self, seed: int, split: Split, index: int) -> Problem:
        generator = random.Random(f"{self.name}/{self.digits}/{seed}/{split}/{index}")
        while True:
            digits = [generator.randint(1, 9) for _ in range(self.digits)]
            solution = _expression(generator, digits)
            target = value_of(solution)
            content = f"{self.name}/{target}/{''.join(map(str, sorted(digits)))}"  # the same in any order of digits
            if target >= 0 and split_of(content) == split:
                break
        prompt = f"Make {target} of {' '.join(map(str, digits))}"
        # By prompt alone, so that the same prompt has the same demonstration wherever it is drawn.
        form = _expression(random.Random(f"{self.name}/form/{prompt}"), digits)
        return Problem(content, prompt, {"target": target, "digits": digits}, solution, form, task=self.name)

    def score(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        return [_score(attempt) for attempt in attempts]


def _expression(generator: random.Random, digits: Sequence[int]) -> str:
    order = generator.sample(list(digits), k=len(digits))
    signs = [generator.choice("+-*") for _ in order[1:]]
    return str(order[0]) + "".join(f"{sign}{digit}" for sign, digit in zip(signs, order[1:], strict=True))


def _score(attempt: Attempt) -> TaskScore:
    match = re.fullmatch(r"Make ([0-9]+) of ([1-9](?: [1-9])*)", str(attempt.problem.prompt))
    if match is None:
        return TaskScore.unscorable("not a prompt of this task", f"{attempt.problem.prompt!r} is not 'Make N of D D D'")
    try:
        value = value_of(attempt.completion)
    except ValueError as error:
        return TaskScore(0.0, str(error))
    if sorted(re.findall(r"[0-9]+", attempt.completion)) != sorted(match[2].split()):
        return TaskScore(0.0, "other digits")
    return TaskScore(1.0, "right") if value == int(match[1]) else TaskScore(0.0, "another number")
