"""A reward of the part of a completion that follows its reasoning."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from posttrain.rewards.attempt import Attempt, TaskScore
from posttrain.rewards.reward import Reward


class BehindReward:
    """Gives what `reward` gives the text behind the last `marker`, and 0 to a completion that has none."""

    def __init__(self, reward: Reward, marker: str) -> None:
        self.reward, self.marker = reward, marker
        self.compares, self.quick = reward.compares, reward.quick
        self.answer_is_text = reward.answer_is_text
        self.made_from: Mapping[str, str] = reward.made_from

    def check(self, key: str) -> None:
        """Raises ConfigError if the reward cannot be used."""
        self.reward.check(key)

    def __call__(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        scores = [TaskScore(0.0, f"no {self.marker}")] * len(attempts)
        marked = [i for i, attempt in enumerate(attempts) if self.marker in attempt.completion]
        texts = [attempts[i].completion.rpartition(self.marker)[2].strip() for i in marked]
        seen = [replace(attempts[i], completion=text) for i, text in zip(marked, texts, strict=True)]
        for i, score in zip(marked, self.reward(seen), strict=True):
            scores[i] = score
        return scores
