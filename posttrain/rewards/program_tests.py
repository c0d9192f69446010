"""The reward for code that passes unit tests, run in the sandbox of the evaluation of programs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from configs.loader import ConfigError
from posttrain.rewards.attempt import Attempt, TaskScore
from pretrain.evaluation.sandbox import Limits, run_programs

WORKERS = 4  # programs at a time


class ProgramTests:
    """Runs the code of each completion with the tests in the problem's answer: a program's text, or a list of them.

    Code is the last block between ``` lines, or the whole completion. Each test of a list is a run of its own. Reward
    is 1 if all tests end without an exception, as in HumanEval (Chen et al. 2021), or with `partial` the share of them
    that does. Code that takes too much time or memory has failed.
    """

    compares, quick, answer_is_text = True, False, False
    made_from: Mapping[str, str] = {}

    def __init__(self, limits: Limits, partial: bool = False) -> None:
        self.limits, self.partial = limits, partial

    @property
    def seconds(self) -> float:
        """The time for one test, in seconds."""
        return self.limits.seconds

    def check(self, key: str) -> None:
        """Raises ConfigError if the sandbox cannot run a program on this machine."""
        (outcome,) = run_programs(["assert 1 + 1 == 2"], self.limits, 1)
        if not outcome.passed:
            raise ConfigError(
                f"{key} cannot run a program here: {outcome.result}; raise {key}.seconds or its memory_mb"
            )

    def __call__(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        tests = [tests_of(attempt.problem.answer) for attempt in attempts]
        programs = [
            f"{code_in(attempt.completion)}\n\n{test}\n"
            for attempt, own in zip(attempts, tests, strict=True)
            for test in own
        ]
        outcomes = iter(run_programs(programs, self.limits, WORKERS))
        return [self._score([next(outcomes) for _ in own]) for own in tests]

    def _score(self, outcomes: Sequence[Any]) -> TaskScore:
        if not outcomes:
            return TaskScore.unscorable("the answer holds no tests")
        failed = [outcome.result for outcome in outcomes if not outcome.passed]
        share = 1 - len(failed) / len(outcomes)
        return TaskScore(
            share if self.partial else float(not failed), "wrong" if failed else "right", detail="".join(failed[:1])
        )


def tests_of(answer: Any) -> list[str]:
    """Returns the tests in an answer, none if it holds something else."""
    tests = answer if isinstance(answer, list) else [answer]
    return tests if all(isinstance(test, str) and test.strip() for test in tests) else []


def code_in(completion: str) -> str:
    """Returns the last block of code between ``` lines, or all of the text if there is none."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", completion, re.DOTALL | re.MULTILINE)
    return blocks[-1] if blocks else completion
