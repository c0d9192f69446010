"""The log of a run's steps, in which a step is written when the next one has been handed to the device.

Until then nobody asks for its results, so that a GPU always has work waiting (see `parallel.step_sums`).
"""

import contextlib
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from configs.model import ModelConfig
from pretrain.health.rewind_history import BadStep, SampleRange
from pretrain.health.spikes import SpikeGuard
from pretrain.health.stragglers import Stragglers
from pretrain.logs.display import Display, shown
from pretrain.logs.metrics import MetricsLog
from pretrain.model.batch import Batch
from pretrain.parallel import details, expert_balance
from pretrain.parallel.step_sums import StepSums


class StepTimer:
    """Measures the time of a step from its making to `stop`: on a GPU by the GPU, which runs behind the host."""

    def __init__(self, device: torch.device):
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._started, self._ended = time.perf_counter(), 0.0
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[0].record()

    def stop(self) -> None:
        self._ended = time.perf_counter()
        if self._events:
            self._events[1].record()

    def seconds(self) -> float:
        """The time that was measured; on a GPU it waits until the step is done."""
        if self._events is None:
            return self._ended - self._started
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that this process has had: allocated by torch on a GPU, else resident in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass
class Step:
    """Step that the host has handed to the device, on which it may still be running."""

    number: int  # steps done, this one included
    tokens: int  # processed since the run began
    batch_tokens: int
    samples: SampleRange  # of the global batch
    lr: float
    sums: StepSums
    timer: StepTimer
    memory_bytes: int
    source_metrics: dict[str, float]
    batches: Sequence[Batch]  # this rank's micro-batches
    more: dict[str, Any] = field(default_factory=dict)  # what else its line shall have

    def record(self, sources: list[str], model: ModelConfig, mfu_per_rate: float | None) -> dict[str, Any]:
        """Returns the step's line of metrics.jsonl; waits for the step. `mfu_per_rate` is MFU / (tokens/s).

        Raises FloatingPointError if the gradient norm is not finite.
        """
        sums = self.sums
        tokens_per_s = self.batch_tokens / self.timer.seconds()
        record: dict[str, Any] = {
            "step": self.number,
            "tokens": self.tokens,
            "loss": _finite(sums.mean_loss),
            "grad_norm": _finite(sums.grad_norm),
            "lr": self.lr,
            "tokens_per_s": round(tokens_per_s, 1),
            "mfu": None if mfu_per_rate is None else round(tokens_per_s * mfu_per_rate, 4),
            "memory_bytes": self.memory_bytes,
        }
        if len(sources) > 1:
            pairs = zip(sources, sums.mean_losses, strict=True)
            record["loss_by_source"] = {name: _finite(loss) for name, loss in pairs if loss is not None}
        metrics = {name: _finite(value) for name, value in sums.metrics.items()}
        experts = expert_balance.described(sums.experts, model)
        return record | metrics | experts | details.described(sums.details) | self.source_metrics | self.more


class NonFiniteStep(FloatingPointError):
    """Error for a step that ends the run, since its gradient norm is not finite."""

    def __init__(self, step: Step, why: str):
        super().__init__(f"step {step.number}: {why}")
        self.step = step


class StepLog:
    """Writes steps to metrics.jsonl and the display, each when the one after it is added.

    All ranks add their steps, though only the main one has a `log` and a `display`, which shows every `every`-th step
    and the last one of `steps`: all count the trained tokens of each of the `sources` in `tokens`, and all find a
    gradient that is not finite in the same step.
    """

    def __init__(
        self,
        log: MetricsLog | None,
        display: Display | None,
        every: int,
        steps: int,
        model: ModelConfig,
        sources: list[str],
        tokens: dict[str, float],
        mfu_per_rate: float | None,
        spikes: SpikeGuard,
        stragglers: Stragglers,
    ):
        self.log, self.display, self._spikes, self._stragglers = log, display, spikes, stragglers
        self._every, self._steps, self._model = every, steps, model
        self._sources, self._tokens, self._mfu_per_rate = sources, tokens, mfu_per_rate
        self._newest: Step | None = None

    def add(self, step: Step) -> None:
        """Takes a step, and writes the one before it.

        Raises NonFiniteStep if the gradient of the one before was not finite, FloatingPointError if too many steps were
        skipped, and BadStep if the run shall go back before it.
        """
        earlier, self._newest = self._newest, step
        if earlier is not None:
            self._write(earlier)

    def flush(self) -> None:
        """Waits for the newest step and writes it. Raises as `add` does, for the newest step."""
        newest, self._newest = self._newest, None
        if newest is not None:
            self._write(newest)

    def go_back(self, step: int) -> None:
        """Forgets the steps after step `step`, from which the run goes on."""
        self._newest = None
        if self.log:
            self.log.go_back(step)

    def say(self, text: str) -> None:
        """Prints a line, on the main rank."""
        if self.display:
            self.display.say(f"{self.display.title}: {text}")

    def close(self) -> None:
        """Writes the newest step after an error, if it is done: a wait for it might never end."""
        if self._newest is not None and self._newest.sums.is_there:
            with contextlib.suppress(FloatingPointError, BadStep):  # of two errors the first tells more
                self.flush()

    def _write(self, step: Step) -> None:
        try:
            record = step.record(self._sources, self._model, self._mfu_per_rate)
        except FloatingPointError as error:
            self._newest = None  # it went on from a step that failed
            raise NonFiniteStep(step, str(error)) from None
        sums = step.sums
        found = self._spikes.note(step.number, sums.mean_loss, sums.grad_norm, sums.applied)
        if found and self._spikes.rewinds:
            self._newest = None
            raise BadStep(step.number, step.samples, record | found, step.batches)
        for name, weight in zip(self._sources, sums.weights if sums.applied else [], strict=False):
            self._tokens[name] += weight
        if self.log:
            self.log.write(record | found)
        for sentence in self._stragglers.note(sums.busy) if self.display else ():
            self.say(f"step {step.number - 1}: {sentence}")
        if found and self.display:
            self.display.say(f"step {step.number} is a spike: {spike(record | found)}")
        if self.display and (step.number % self._every == 0 or step.number == self._steps):
            self.display.update(record, self._tokens)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no other numbers


def spike(record: dict[str, Any]) -> str:
    """Describes, for the screen, a step whose loss or gradient norm is far above those before it."""
    parts = [
        f"{words} {shown(record[name], '.4g')}"
        + (f", {record[f'{name}_spike']} deviations above the median" if record.get(f"{name}_spike") else "")
        for name, words in (("loss", "loss"), ("grad_norm", "gradient norm"))
        if f"{name}_spike" in record
    ]
    return "; ".join(parts) + ("; it changed no weight" if "skipped" in record else "")
