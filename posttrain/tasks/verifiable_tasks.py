"""The task that a config names, and the task of sorting digits, whose problems are generated without end."""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs.loader import ConfigError
from configs.tasks import TaskConfig, TaskPartConfig
from posttrain.rewards.reward_registry import make_rewards
from posttrain.tasks.countdown import CountdownTask
from posttrain.tasks.file_task import FileTask
from posttrain.tasks.task import Attempt, Problem, Split, Task, TaskScore, split_of
from posttrain.tasks.task_mixture import MixtureTask

MadeFrom = Mapping[str, Mapping[str, str]]
LEAST_DIGITS, MOST_DIGITS = 3, 32


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

    @property
    def facts(self) -> dict[str, Any]:
        return dict(vars(self))

    @property
    def reward_names(self) -> tuple[str, ...]:
        return ()

    @property
    def reward_weights(self) -> dict[str, float]:
        return {}

    def size(self, split: Split) -> None:
        return None

    def problem(self, seed: int, split: Split, index: int) -> Problem:
        drawn = self._draw_digits(seed, split, index)
        answer = "".join(sorted(drawn))
        return Problem(f"{self.name}/{drawn}", f"Sort {drawn}", answer, answer, answer, task=self.name)

    def score(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        """Returns 1 for each exact answer, else 0; unscorable if the prompt is not one of this task."""
        return [self._score(attempt.problem, attempt.completion) for attempt in attempts]

    def smaller(self) -> Iterator[tuple[int, Task]]:
        for digits in range(self.digits - 1, LEAST_DIGITS - 1, -1):
            yield digits, replace(self, digits=digits)

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


def make_task(settings: TaskConfig, begun: MadeFrom | None = None) -> Task:
    """Returns the task that a config names. Raises ConfigError if its files or rewards cannot be used.

    `begun` is what `made_from` returned when a run that goes on began.
    """
    most = settings.max_new_tokens
    if settings.kind != "mixture":
        return _make(settings, settings.name, most, "task", begun)
    parts = {
        name: (part.weight, _make(part, name, most, f"task.tasks.{name}", begun))
        for name, part in settings.tasks.items()
    }
    return MixtureTask(settings.name or settings.kind, parts, most)


def made_from(task: Task) -> MadeFrom:
    """Returns what the rewards of a task are made from outside the config, by config key: reward models, functions."""
    if isinstance(task, MixtureTask):
        return {key: facts for part in task.parts.values() for key, facts in made_from(part).items()}
    if not isinstance(task, FileTask):
        return {}
    return {f"{task.key}.rewards.{name}": facts for name, facts in task.rewards.made_from.items()}


def _make(settings: TaskPartConfig, name: str, max_new_tokens: int, key: str, begun: MadeFrom | None) -> Task:
    try:
        match settings.kind:
            case "sort":
                return SortTask(settings.digits or SortTask.digits, max_new_tokens)
            case "countdown":
                return CountdownTask(settings.digits or CountdownTask.digits, max_new_tokens)
            case "file":
                rewards = make_rewards(settings.rewards, f"{key}.rewards", begun)
                return FileTask(name or settings.kind, settings, rewards, max_new_tokens, key)
            case kind:
                raise ConfigError(f"{key}.kind = {kind!r} is no task")
    except ValueError as error:
        raise ConfigError(str(error)) from None
