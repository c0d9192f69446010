"""What a proof found: each tensor's error beside what rounding explains of it, and a verdict on a layout.

However large the model, a verdict keeps a few hundred errors: those out of bounds that come first, and those nearest
to their bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# What a verdict has a worst error of. The last four are the passes of a step, and begin the names of their tensors.
COLUMNS = {
    "loss": "loss",
    "grad_norm": "grad norm",
    "forward": "forward",
    "backward": "backward",
    "grad": "gradients",
    "weight": "weights",
}
KEPT, FIRST_FAILED = 200, 20


@dataclass(frozen=True)
class Error:
    """A relative error, and how large one rounding explains."""

    name: str
    found: float
    allowed: float

    @property
    def within(self) -> bool:
        return self.found <= self.allowed

    @property
    def share(self) -> float:
        """Of what is allowed; what is not a number is beyond everything."""
        return self.found / self.allowed if math.isfinite(self.found) else math.inf

    def __str__(self) -> str:
        return f"{self.name}: {self.found:.1e}, allowed {self.allowed:.1e}"


@dataclass
class Verdict:
    """One layout's comparison. `first` is the first tensor on the way that is out of bounds, None if none is."""

    layout: str
    ranks: int
    seconds: float
    worst: dict[str, Error] = field(default_factory=dict)  # for each of COLUMNS, the error nearest to its bound
    num_tensors: int = 0
    num_failed: int = 0
    failed: list[str] = field(default_factory=list)  # the first FIRST_FAILED of them, as sentences
    first: str | None = None
    errors: list[tuple[int, Error]] = field(default_factory=list)  # with the tensor's index on the way

    @property
    def passed(self) -> bool:
        return not self.num_failed

    def add(self, column: str, error: Error) -> None:
        if column not in self.worst or error.share > self.worst[column].share:
            self.worst[column] = error
        if not error.within:
            self.fail(str(error))

    def fail(self, sentence: str) -> None:
        self.num_failed += 1
        if len(self.failed) < FIRST_FAILED:
            self.failed.append(sentence)

    def add_tensors(self, errors: Sequence[Error]) -> None:
        """Those of all tensors, in the order in which a step computes them."""
        for error in errors:
            self.add(error.name.partition("/")[0], error)
        failed = [index for index, error in enumerate(errors) if not error.within]
        nearest = sorted(range(len(errors)), key=lambda index: -errors[index].share)
        self.errors = [(index, errors[index]) for index in sorted({*failed[:FIRST_FAILED], *nearest[:KEPT]})]
        self.num_tensors, self.first = len(errors), errors[failed[0]].name if failed else None

    def as_json(self) -> dict[str, Any]:
        """What is not a number becomes text: JSON has none."""
        return {"passed": self.passed, **_finite(asdict(self))}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
