"""Methods that the tasks of digits share: problems are drawn without end, and a task has one reward."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from posttrain.tasks.task import Split


@dataclass(frozen=True)
class DigitTask:
    """The methods that every task of digits has alike; a task adds `problem` and `score`."""

    least_digits: ClassVar[int]
    most_digits: ClassVar[int]
    advice: ClassVar[str]  # how many digits to take, for the message about a number outside the range

    digits: int
    max_new_tokens: int
    name: str

    def __post_init__(self) -> None:
        if not self.least_digits <= self.digits <= self.most_digits:
            raise ValueError(
                f"task.digits = {self.digits} is outside {self.least_digits} to {self.most_digits}{self.advice}"
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

    def smaller(self) -> Iterator[tuple[int, Self]]:
        for digits in range(self.digits - 1, self.least_digits - 1, -1):
            yield digits, replace(self, digits=digits)
