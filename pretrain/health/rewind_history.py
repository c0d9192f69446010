"""Rewinds of a run, each to the last good checkpoint before a bad step, and the samples that are passed over since.

The main rank keeps them in rewinds.json. A step whose samples would touch a range that is passed over begins after
it, and a new data span begins with it, so that the history of the run says which step was trained on which samples
(see `pretrain.run.history`). Where training goes on after a rewind depends on the checkpoint and the ranges alone.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from configs import files
from configs.loader import ConfigError
from configs.train import SpikesConfig
from pretrain.health.spikes import PERIOD
from pretrain.model.batch import Batch

FILE = "rewinds.json"
SampleRange = tuple[int, int]  # the first sample, and the one after the last


class RunRanks(Protocol):
    """The ranks of a run, of which one writes."""

    @property
    def is_main(self) -> bool: ...

    def gather_json(self, value: Any) -> list[Any]: ...


class BadStep(Exception):
    """A step before which the run goes back.

    `samples` are those of its global batch, `record` is its line of the log, and `batches` are this rank's part of it.
    """

    def __init__(self, step: int, samples: SampleRange, record: dict[str, Any], batches: Sequence[Batch]):
        super().__init__(f"step {step}")
        self.step, self.samples, self.record, self.batches = step, samples, record, batches

    @property
    def is_finite(self) -> bool:
        """Whether the loss and the gradient norm are finite."""
        return self.record.get("loss") is not None and self.record.get("grad_norm") is not None


@dataclass(frozen=True)
class Rewind:
    """A return to the checkpoint of step `to_step`, since step `step` was bad, whose `samples` are passed over."""

    step: int
    to_step: int
    samples: SampleRange
    data: str  # fingerprint of the batch source
    loss: float | None
    grad_norm: float | None


def _rewinds(found: Any) -> list[Rewind]:
    """Returns the rewinds in the content of rewinds.json."""
    return [Rewind(**{**one, "samples": tuple(one["samples"])}) for one in found]


class Rewinds:
    """The rewinds of a run and the ranges of samples that it passes over, the same on all ranks.

    `data` is the fingerprint of the batch source. Ranges come from the config, from rewinds.json, and from the
    manifest of the checkpoint that a run begins from.
    """

    def __init__(self, settings: SpikesConfig, run_dir: Path, mesh: RunRanks, data: str):
        self._settings, self._path, self._mesh, self._data = settings, run_dir / FILE, mesh, data
        self._known: list[Rewind] = []
        self.ranges: list[SampleRange] = sorted(settings.pass_over)

    def begin(self, manifest: dict[str, Any] | None) -> None:
        """Reads what is known when training starts, from `manifest` unless the run is new. Collective.

        Raises ConfigError, on all ranks, if the file is damaged.
        """
        found: list[dict[str, Any]] | str = []
        if self._mesh.is_main and manifest is not None and self._path.is_file():
            try:
                found = json.loads(self._path.read_bytes())
                _rewinds(found)
            except (ValueError, TypeError, KeyError) as error:
                found = f"{self._path} is damaged ({error})"
        found = self._mesh.gather_json(found)[0]
        if isinstance(found, str):
            raise ConfigError(
                f"{found}; restore it, or remove it: the run may then train again on samples that it has passed over "
                "since the checkpoint that it goes on from"
            )
        self._known = _rewinds(found)
        earlier = [(first, end) for first, end in (manifest or {}).get("passed_over", [])]
        self._add(*earlier, *(one.samples for one in self._known if one.data == self._data))

    def forget(self) -> None:
        """Removes the file of an earlier run, whose checkpoints somebody removed."""
        if self._mesh.is_main:
            self._path.unlink(missing_ok=True)

    def first_of(self, sample: int, count: int) -> int:
        """Returns the first sample of the next step, which has `count` samples and would begin with `sample`."""
        for first, end in self.ranges:
            if sample < end and sample + count > first:
                sample = end
        return sample

    def firsts(self, sample: int, count: int, steps: int) -> Iterator[int]:
        """Yields the first sample of each of the next `steps` steps."""
        for _ in range(steps):
            sample = self.first_of(sample, count)
            yield sample
            sample += count

    def passed_over(self, sample: int, count: int, steps: int) -> int:
        """Returns how many samples from `sample` on the next `steps` steps, of `count` samples, pass over."""
        begin, needed = sample, steps * count
        for first, end in self.ranges:
            before = max(0, first - sample) // count  # steps that fit before the range
            if end > sample and before < steps:
                steps, sample = steps - before, end
        return sample + steps * count - begin - needed

    def refusal(self, bad: BadStep) -> str:
        """Returns why the run may not go back before a bad step, and "" if it may."""
        recent = [one for one in self._known if one.step > bad.step - PERIOD]
        most = self._settings.most_rewinds
        if len(recent) < most:
            return ""
        steps = ", ".join(str(one.step) for one in recent)
        return (
            f"the run went back {len(recent)} times in the last {PERIOD} steps, before steps {steps}, and now step "
            f"{bad.step} is bad; spikes.most_rewinds = {most} allows no more. Their samples are in {self._path}; look "
            "at them (`trivium data trace`), lower optimizer.lr, or raise spikes.most_rewinds"
        )

    def add(self, bad: BadStep, to_step: int) -> None:
        """Notes a rewind; its samples are passed over from now on."""
        loss, norm = bad.record.get("loss"), bad.record.get("grad_norm")
        self._known.append(Rewind(bad.step, to_step, bad.samples, self._data, loss, norm))
        self._add(bad.samples)
        if self._mesh.is_main:
            content = json.dumps([asdict(one) for one in self._known], indent=1)
            files.write_atomic(self._path, content.encode())

    def _add(self, *ranges: SampleRange) -> None:
        self.ranges = sorted({*self.ranges, *ranges})
