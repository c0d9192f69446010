"""A mixture of tasks, drawn by weight, each scored by its own rewards."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from posttrain.rewards.attempt import Attempt, Problem, TaskScore
from posttrain.tasks.task import Split, Task


class MixtureTask:
    """Tasks by name, with a weight each.

    Problem i belongs to the task that is furthest behind its share of the first i + 1, so shares hold for any number of
    problems, and each task is asked for its problems 0, 1, 2... in order.
    """

    def __init__(self, name: str, parts: Mapping[str, tuple[float, Task]], max_new_tokens: int) -> None:
        self.name, self.max_new_tokens = name, max_new_tokens
        self.parts = {part: task for part, (_, task) in parts.items()}
        total = sum(weight for weight, _ in parts.values())
        self._shares = [weight / total for weight, _ in parts.values()]
        self._parts_of_indices: list[tuple[int, int]] = []  # of each index: number of the part, index in the part
        self._counts = [0] * len(parts)

    @property
    def facts(self) -> dict[str, Any]:
        shares = dict(zip(self.parts, self._shares, strict=True))
        parts = {part: {"share": shares[part], **task.facts} for part, task in self.parts.items()}
        return {"name": self.name, "max_new_tokens": self.max_new_tokens, "parts": parts}

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The names of the tasks, under each of which its score is written, and of their rewards, as `task/reward`."""
        rewards = (f"{part}/{name}" for part, task in self.parts.items() for name in task.reward_names)
        return (*self.parts, *rewards)

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weights of the rewards of all tasks; the score of a task with but one reward has weight 1."""
        found: dict[str, float] = {}
        for part, task in self.parts.items():
            own = {f"{part}/{name}": weight for name, weight in task.reward_weights.items()}
            found |= own or {part: 1.0}
        return found

    def size(self, split: Split) -> int | None:
        """Returns the number of problems after which one of the parts would repeat its own."""
        sizes = [task.size(split) for task in self.parts.values()]
        if all(size is None for size in sizes):
            return None
        index = 0
        while True:
            part, own_index = self._part_of(index)
            size = sizes[part]
            if size is not None and own_index >= size:
                return index
            index += 1

    def problem(self, seed: int, split: Split, index: int) -> Problem:
        part, own_index = self._part_of(index)
        name = list(self.parts)[part]
        return replace(self.parts[name].problem(seed, split, own_index), task=name)

    def score(self, attempts: Sequence[Attempt]) -> list[TaskScore]:
        """Returns the score that each attempt's own task gives, with the task's name before those of its rewards."""
        scores: list[TaskScore | None] = [None] * len(attempts)
        for name, task in self.parts.items():
            own = [i for i, attempt in enumerate(attempts) if attempt.problem.task == name]
            for i, score in zip(own, task.score([attempts[i] for i in own]), strict=True):
                parts = {f"{name}/{reward}": value for reward, value in score.parts.items()}
                if score.value is not None:
                    parts = {name: score.value, **parts}
                scores[i] = replace(score, parts=parts)
        return [score or TaskScore.unscorable("a task that is not in the mixture") for score in scores]

    def smaller(self) -> Iterator[tuple[int, Task]]:
        return iter(())

    def __str__(self) -> str:
        return f"{self.name} of {', '.join(f'{s:.0%} {p}' for p, s in zip(self.parts, self._shares, strict=True))}"

    def _part_of(self, index: int) -> tuple[int, int]:
        while len(self._parts_of_indices) <= index:
            total = len(self._parts_of_indices) + 1
            behind = [share * total - count for share, count in zip(self._shares, self._counts, strict=True)]
            part = behind.index(max(behind))
            self._parts_of_indices.append((part, self._counts[part]))
            self._counts[part] += 1
        return self._parts_of_indices[index]
