"""The protocol of rewards, and the weighted sum of several, which is the score of a task that is read from files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from posttrain.rewards.attempt import Attempt, TaskScore
from posttrain.rewards.unscorable import Unscorable


class Reward(Protocol):
    """Scores attempts, in batches; it never raises for what a model wrote, and never waits without end."""

    compares: bool  # whether it accepts a problem's own solution, with 1
    quick: bool  # whether it scores a whole file of solutions in seconds, the same on all ranks
    answer_is_text: bool  # whether a completion may say a problem's answer; it cannot say unit tests, for example
    made_from: Mapping[str, str]  # files outside the config that decide its values, with their SHA-256

    def check(self, key: str) -> None:
        """Raises ConfigError, naming keys below `key`, if it cannot be used: without its package, for example."""
        ...

    def __call__(self, attempts: Sequence[Attempt]) -> list[TaskScore]: ...


class RuleReward:
    """A reward whose function is one of Trivium's own, fast enough to be called in this process."""

    quick, compares = True, True
    made_from: Mapping[str, str] = {}

    def __init__(self, function: Callable[..., float], answer_is_text: bool = True, **options: Any) -> None:
        self.function, self.answer_is_text, self.options = function, answer_is_text, options

    def check(self, key: str) -> None:
        """Does nothing: a rule can always be used."""

    def __call__(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        return [self._score(attempt) for attempt in attempts]

    def _score(self, attempt: Attempt) -> TaskScore:
        problem = attempt.problem
        try:
            value = self.function(problem.prompt, attempt.completion, problem.answer, problem.metadata, **self.options)
        except Unscorable as error:
            return TaskScore.unscorable(str(error))
        return TaskScore.of(value)


class WeightedRewards:
    """The weighted sum of rewards by name. An attempt that one of them cannot judge is unscorable as a whole."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        self.rewards, self.weights = dict(rewards), dict(weights)

    @property
    def made_from(self) -> dict[str, Mapping[str, str]]:
        """Files beside the config that a reward's values depend on, by reward; rewards without any are left out."""
        return {name: reward.made_from for name, reward in self.rewards.items() if reward.made_from}

    @property
    def answer_is_text(self) -> bool:
        """Whether a completion may say a problem's answer."""
        return all(reward.answer_is_text for reward in self.rewards.values())

    def __call__(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        columns = [reward(attempts) for reward in self.rewards.values()]
        return [self._sum(scores) for scores in zip(*columns, strict=True)] if attempts else []

    def check(self, key: str) -> None:
        """Raises ConfigError if a reward cannot be used."""
        for name, reward in self.rewards.items():
            reward.check(f"{key}.{name}")

    def _sum(self, scores: Sequence[TaskScore]) -> TaskScore:
        named = dict(zip(self.rewards, scores, strict=True))
        parts = {name: score.value for name, score in named.items() if score.value is not None}
        for name, score in named.items():
            if score.value is None:
                return TaskScore(None, f"{name}: {score.reason}", parts, score.detail)
        total = sum(self.weights[name] * value for name, value in parts.items())
        only = next(iter(named.values()))
        return replace(TaskScore.of(total, only.reason if len(named) == 1 else "scored"), parts=parts)
