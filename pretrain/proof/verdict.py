"""Collects the errors of a layout's tensors, each with its bound, into a verdict on the layout.

A verdict keeps a few hundred errors however large the model: the first that are out of bounds, and those nearest to
their bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# The kinds of errors, with the titles of their columns. The last four are passes of a step, with which names of tensors
# begin.
COLUMNS = {
    "loss": "loss",
    "grad_norm": "grad norm",
    "forward": "forward",
    "backward": "backward",
    "grad": "gradients",
    "state": "state",
}
KEPT, FIRST_FAILED = 200, 20


@dataclass(frozen=True)
class RelativeError:
    """The relative error of a number or tensor, with the largest one that rounding explains."""

    name: str
    found: float
    allowed: float

    @property
    def within(self) -> bool:
        return self.found <= self.allowed

    @property
    def share(self) -> float:
        """The error as a share of its bound; infinite if the error is no finite number."""
        return self.found / self.allowed if math.isfinite(self.found) else math.inf

    def __str__(self) -> str:
        return f"{self.name}: {self.found:.1e}, allowed {self.allowed:.1e}"


@dataclass
class Verdict:
    """The result of comparing one layout. `first` is the first tensor of the step that is out of bounds, if any is."""

    layout: str
    ranks: int
    seconds: float
    precision: str
    worst: dict[str, RelativeError] = field(default_factory=dict)  # by column: the error nearest to its bound
    num_tensors: int = 0
    num_failed: int = 0
    failed: list[str] = field(default_factory=list)  # sentences about the first FIRST_FAILED failures
    first: str | None = None
    errors: list[tuple[int, RelativeError]] = field(default_factory=list)  # with the tensor's index in the step

    @property
    def passed(self) -> bool:
        return not self.num_failed

    def add(self, column: str, error: RelativeError) -> None:
        """Adds an error to its column; one out of bounds is a failure."""
        if column not in self.worst or error.share > self.worst[column].share:
            self.worst[column] = error
        if not error.within:
            self.fail(str(error))

    def fail(self, sentence: str) -> None:
        """Counts a failure that `sentence` describes."""
        self.num_failed += 1
        if len(self.failed) < FIRST_FAILED:
            self.failed.append(sentence)

    def add_tensors(self, errors: Sequence[RelativeError]) -> None:
        """Adds the errors of all tensors, which are in the order in which a step computes them."""
        for error in errors:
            self.add(kind_of(error.name), error)
        failed = [index for index, error in enumerate(errors) if not error.within]
        nearest = sorted(range(len(errors)), key=lambda index: -errors[index].share)
        self.errors = [(index, errors[index]) for index in sorted({*failed[:FIRST_FAILED], *nearest[:KEPT]})]
        self.num_tensors, self.first = len(errors), errors[failed[0]].name if failed else None

    def as_json(self) -> dict[str, Any]:
        """Returns JSON values; NaN and infinity become text, since JSON has neither."""
        return {"passed": self.passed, **_finite(asdict(self))}


def kind_of(name: str) -> str:
    """Returns the column of a tensor: `state` for `state.exp_avg/x`."""
    return name.partition("/")[0].partition(".")[0]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
