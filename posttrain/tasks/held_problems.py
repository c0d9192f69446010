"""Problems that a task holds in memory, by split, in an order of their own for each seed and epoch."""

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache

from posttrain.records import UnusedRecords
from posttrain.rewards.attempt import Problem, TaskScore
from posttrain.tasks.task import Split, Task


class HeldProblems:
    """The part of a task that gives its problems, sets some aside, and counts what could not be scored."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.set_aside = UnusedRecords()
        self.unscorable = Counter[str]()  # attempts of this process that could not be judged, by reason
        self.problems: dict[Split, list[Problem]] = {"train": [], "heldout": []}
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def size(self, split: Split) -> int:
        return len(self.problems[split])

    def problem(self, seed: int, split: Split, index: int) -> Problem:
        """Returns a problem: training ones in a new random order each epoch, held-out ones always in the same order."""
        problems = self.problems[split]
        epoch, position = divmod(index, len(problems))
        return problems[position if split == "heldout" else self._order(seed, epoch)[position]]

    def smaller(self) -> Iterator[tuple[int, Task]]:
        return iter(())

    def keep(self, usable: Callable[[Problem], tuple[str, str] | None]) -> None:
        """Sets aside the problems for which `usable` returns (reason, details).

        Which problems are left must be the same on all ranks.
        """
        for split, problems in self.problems.items():
            kept = []
            for problem in problems:
                if fault := usable(problem):
                    self.set_aside.add(fault[0], problem.id, fault[1])
                else:
                    kept.append(problem)
            self.problems[split] = kept
        self._order.cache_clear()

    def note(self, score: TaskScore, what: str) -> None:
        """Counts a score that could not be given, and says on stderr why; `what` are the attempts, for example."""
        if score.value is None:
            self.unscorable[score.reason] += 1
            count = self.unscorable[score.reason]
            if str(count).strip("0") == "1":  # 1, 10, 100 and so on
                said = f"{score.reason}{score.detail and ', ' + score.detail}"
                print(f"note: unscorable {what} {self.name}, {count} so far: {said}", file=sys.stderr)

    @property
    def reasons(self) -> str:
        """The counts of problems set aside by reason, as text."""
        return str(self.set_aside)

    def _shuffled(self, seed: int, epoch: int) -> list[int]:
        order = list(range(len(self.problems["train"])))
        random.Random(f"{self.name}/{seed}/{epoch}").shuffle(order)  # a string seed is hashed the same everywhere
        return order
