"""Spikes: steps whose loss or gradient norm lies far above that of the steps before, and what a run does about them.

How far is measured by a robust z-score: (value - median) / (1.4826 * median absolute deviation) over the last
`spikes.window` steps, of which 1.4826 makes the denominator the standard deviation of normally distributed values
(Rousseeuw and Croux 1993). For the gradient norm the values are logarithms: norms, of small batches above all, have a
long tail to the right, so that on their own scale ordinary steps would lie many deviations above the median. Steps that
were skipped are not among them. The bound of a step is known before it begins, from the steps up to the one before the
last, so that no step waits for the results of another.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from configs.train import SpikesConfig

NORMAL = 1.4826
LEAST_STEPS = 20  # that are needed for a z-score
LEAST_SPREAD = 0.05  # of the median, or of a logarithm: a spread below it would call small changes of a curve spikes
SMALLEST = 1e-30  # stands for smaller norms, whose logarithm would not be finite
PERIOD = 1000  # steps in which at most `spikes.most_skipped` may be skipped


class SpikeGuard:
    """Watches the results of a run's steps; all ranks note the same, and so decide alike."""

    def __init__(self, settings: SpikesConfig):
        self._settings = settings
        self._norms: deque[tuple[int, float]] = deque(maxlen=settings.window + 1)  # (step, value)
        self._losses: deque[tuple[int, float]] = deque(maxlen=settings.window + 1)
        self._skipped: deque[int] = deque(maxlen=settings.most_skipped + 1)

    @property
    def rewinds(self) -> bool:
        """Whether the run goes back to a checkpoint after a spike."""
        return self._settings.action == "rewind"

    @property
    def skips(self) -> bool:
        """Whether the run goes on after a step whose gradient is a spike or not finite, without its update."""
        return self._settings.action == "skip"

    def largest_norm(self, step: int) -> float | None:
        """Returns the gradient norm above which step `step` changes no weight.

        None means that only a norm that is not finite changes none, and that it ends the run.
        """
        if self._settings.action == "log":
            return None
        if self._settings.action == "rewind":
            return math.inf  # a bad step is found after it, and the run goes back before it
        past = [_log(norm) for number, norm in self._norms if number < step - 1]
        if len(past) < LEAST_STEPS:
            return math.inf
        middle, spread = _middle_and_spread(past, 1.0)
        return math.exp(middle + self._settings.z_score * spread)

    def note(self, step: int, loss: float, norm: float, applied: bool) -> dict[str, Any]:
        """Records a step's results, and returns keys for its line of metrics.jsonl: {} unless the step is a spike.

        Raises FloatingPointError if too many of the last steps were skipped.
        """
        found: dict[str, Any] = {}
        losses = [one for number, one in self._losses if number < step - 1]
        norms = [_log(one) for number, one in self._norms if number < step - 1]
        for name, score in (
            ("loss", _z_score(loss, losses, abs(statistics.median(losses or [0.0])))),
            ("grad_norm", _z_score(_log(norm), norms, 1.0)),
        ):
            if score > self._settings.z_score:
                found[f"{name}_spike"] = round(score, 1) if math.isfinite(score) else None
        if applied:
            self._losses.append((step, loss))
            self._norms.append((step, norm))
            return found
        if self.rewinds:
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
        """Returns the guard's state for a checkpoint, so that a resumed run decides as one that never stopped."""
        return {name: list(getattr(self, f"_{name}")) for name in ("norms", "losses", "skipped")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, which a checkpoint kept; {} is the state of a checkpoint without one."""
        self._norms.clear()
        self._losses.clear()
        self._skipped.clear()
        for name in ("norms", "losses"):
            getattr(self, f"_{name}").extend((int(step), float(value)) for step, value in state.get(name, []))
        self._skipped.extend(state.get("skipped", []))


def _log(norm: float) -> float:
    return math.log(max(norm, SMALLEST)) if math.isfinite(norm) else math.inf


def _z_score(value: float, past: list[float], scale: float) -> float:
    """Returns how many robust standard deviations, of at least LEAST_SPREAD of `scale`, a value is above the median."""
    if not math.isfinite(value):
        return math.inf
    if len(past) < LEAST_STEPS:
        return 0.0
    middle, spread = _middle_and_spread(past, scale)
    return (value - middle) / spread


def _middle_and_spread(values: list[float], scale: float) -> tuple[float, float]:
    middle = statistics.median(values)
    deviation = NORMAL * statistics.median(abs(value - middle) for value in values)
    return middle, max(deviation, LEAST_SPREAD * scale, 1e-12)
