"""Spikes: steps whose loss or gradient norm lies far above that of the steps before, and what a run does about them.

How far is measured by a robust z-score: (value - median) / (1.4826 * median absolute deviation) over the last
`spikes.window` steps, of which 1.4826 makes the denominator the standard deviation of normally distributed values
(Rousseeuw and Croux 1993). Steps that were skipped are not among them. The bound of a step is known before it begins,
from the steps up to the one before the last, so that no step waits for the results of another.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from configs.train import SpikesConfig

NORMAL = 1.4826
LEAST_STEPS = 20  # that are needed for a z-score
LEAST_SPREAD = 0.05  # of the median: a spread below it would call small changes of a smooth curve spikes
PERIOD = 1000  # steps in which at most `spikes.most_skipped` may be skipped


class SpikeGuard:
    """Watches the results of a run's steps; all ranks note the same, and so decide alike."""

    def __init__(self, settings: SpikesConfig):
        self._settings = settings
        self._norms: deque[tuple[int, float]] = deque(maxlen=settings.window + 1)  # (step, value)
        self._losses: deque[tuple[int, float]] = deque(maxlen=settings.window + 1)
        self._skipped: deque[int] = deque(maxlen=settings.most_skipped + 1)

    def largest_norm(self, step: int) -> float | None:
        """Returns the gradient norm above which step `step` changes no weight; None if no step is to be skipped."""
        if self._settings.action != "skip":
            return None
        return _bound([norm for number, norm in self._norms if number < step - 1], self._settings.z_score)

    def note(self, step: int, loss: float, norm: float, applied: bool) -> dict[str, Any]:
        """Takes the results of a step, and returns what its line in the log says of it: {} for one like the others.

        Raises FloatingPointError if too many of the last steps were skipped.
        """
        found: dict[str, Any] = {}
        for name, value, past in (("loss", loss, self._losses), ("grad_norm", norm, self._norms)):
            score = _z_score(value, [one for number, one in past if number < step - 1])
            if score > self._settings.z_score:
                found[f"{name}_spike"] = round(score, 1) if math.isfinite(score) else None
        if applied:
            self._losses.append((step, loss))
            self._norms.append((step, norm))
            return found
        self._skipped.append(step)
        if len(self._skipped) > self._settings.most_skipped and step - self._skipped[0] < PERIOD:
            raise FloatingPointError(
                f"{len(self._skipped)} of the last {PERIOD} steps were skipped for their gradients, and "
                f"spikes.most_skipped = {self._settings.most_skipped} may be; look at the data of steps "
                f"{', '.join(map(str, self._skipped))} (`trivium data trace`), lower optimizer.lr, or raise "
                "spikes.most_skipped"
            )
        return {**found, "skipped": 1}

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, so that a run that goes on decides as one that never stopped."""
        return {name: list(getattr(self, f"_{name}")) for name in ("norms", "losses", "skipped")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up a `state`; {} stands for that of a version without one."""
        for name in ("norms", "losses"):
            getattr(self, f"_{name}").extend((int(step), float(value)) for step, value in state.get(name, []))
        self._skipped.extend(state.get("skipped", []))


def _bound(past: list[float], z_score: float) -> float:
    """Returns the value whose z-score is `z_score`; infinite if there are too few values."""
    if len(past) < LEAST_STEPS:
        return math.inf
    middle, spread = _middle_and_spread(past)
    return middle + z_score * spread


def _z_score(value: float, past: list[float]) -> float:
    if not math.isfinite(value):
        return math.inf
    if len(past) < LEAST_STEPS:
        return 0.0
    middle, spread = _middle_and_spread(past)
    return (value - middle) / spread


def _middle_and_spread(values: list[float]) -> tuple[float, float]:
    middle = statistics.median(values)
    deviation = NORMAL * statistics.median(abs(value - middle) for value in values)
    return middle, max(deviation, LEAST_SPREAD * abs(middle), 1e-12)
