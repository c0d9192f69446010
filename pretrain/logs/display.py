"""Display of a training run on the main rank: a live panel on a terminal, plain lines anywhere else."""

import math
import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pages import duration

PLAIN_EVERY_SECONDS = 10.0  # time between lines if stdout is no terminal
REMEMBERED = 50  # steps that the time left is estimated from
CURVE = 240  # last losses that the curve is drawn from
BLOCKS = "▁▂▃▄▅▆▇█"
UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


class Display:
    """Shows where a run is: time left, loss, gradient norm, learning rate, speed, MFU, memory and mixture.

    On a terminal it is a panel of a few lines that stays in place, below what is said; else it is a line every
    PLAIN_EVERY_SECONDS seconds and at the end.
    """

    def __init__(self, title: str, first_step: int, steps: int, console: Console | None = None):
        self.title, self.steps, self._step = title, steps, first_step
        self._record: dict[str, Any] = {}
        self._mixture: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=CURVE)
        self._times: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)
        self._began = self._printed = time.monotonic()
        self._live: Live | None = None
        console = console or Console()
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, refresh_per_second=4, get_renderable=self.panel)
            self._live.start()

    def update(self, record: Mapping[str, Any], mixture: Mapping[str, float]) -> None:
        """Takes the record of a step, as in metrics.jsonl, and the tokens of each source that were trained on."""
        if record["step"] <= self._step:  # the run went back
            self._times.clear()
        now, self._step = time.monotonic(), record["step"]
        self._record, self._mixture = dict(record), dict(mixture)
        self._times.append((now, self._step))
        shown = record.get("reward", record["loss"])
        if shown is not None:
            self._losses.append(shown)
        if self._live is None and (now - self._printed > PLAIN_EVERY_SECONDS or self._step == self.steps):
            self._printed = now
            print(f"{self.title} {self._step}/{self.steps} {self.line()}", flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the panel."""
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Stops updating the panel; later output is printed below it."""
        if self._live is not None:
            self._live.stop()

    def seconds_left(self) -> float | None:
        """Estimates the time to the last step, evaluations and checkpoints included; None before the second step."""
        if len(self._times) < 2:
            return None
        (began, first), (now, last) = self._times[0], self._times[-1]
        return (now - began) / (last - first) * (self.steps - last)

    def line(self) -> str:
        """Returns the numbers of the newest step on one line."""
        left = self.seconds_left()
        parts = [f"{name} {value}" for name, value in self._numbers()] + [self._speed(), *self._machine()]
        if left is not None and self._step < self.steps:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def panel(self) -> RenderableType:
        """Returns the panel with the newest numbers."""
        share = self._step / self.steps
        head = Table.grid(padding=(0, 2, 0, 0))
        left = self.seconds_left()
        head.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=self.steps, completed=self._step, width=24),
            f"{self._step:,}/{self.steps:,}",
            f"{share:.0%}",
            f"{duration(left)} left" if left is not None and self._step < self.steps else "",
            Text(f"{duration(time.monotonic() - self._began)} so far", style="dim"),
        )
        lines: list[RenderableType] = [head]
        if self._record:
            numbers = Text("  ")
            for name, value in self._numbers():
                numbers.append(f"{name} ", style="dim").append(f"{value}   ", style="bold")
            lines.append(_one_line(numbers.append(curve(list(self._losses), 24), style="cyan")))
            tokens = f"{_short(self._record['tokens'])} tokens"
            lines.append(_one_line(Text("  " + "   ".join([self._speed(), *self._machine(), tokens]))))
        whole = sum(self._mixture.values())
        if len(self._mixture) > 1 and whole:
            sources = Text("  ")
            losses = self._record.get("loss_by_source", {})
            for name, found in self._mixture.items():
                loss = f" loss {losses[name]:.3f}" if losses.get(name) is not None else ""
                sources.append(f"{name} ", style="dim").append(f"{found / whole:.0%}{loss}   ")
            lines.append(_one_line(sources))
        return Group(*lines)

    def _numbers(self) -> list[tuple[str, str]]:
        record = self._record
        found = [("reward", f"{record['reward']:.3f}")] if "reward" in record else []
        found += [("loss", shown(record["loss"], ".4f")), ("grad", shown(record["grad_norm"], ".2f"))]
        return [*found, ("lr", f"{record['lr']:.3g}")]

    def _speed(self) -> str:
        return f"{self._record['tokens_per_s']:,.0f} tokens/s"

    def _machine(self) -> list[str]:
        mfu = self._record.get("mfu")
        return [
            *([] if mfu is None else [f"MFU {mfu:.1%}"]),
            f"{self._record['memory_bytes'] / 2**30:.2f} GiB",
        ]


def shown(value: float | None, form: str) -> str:
    """Formats a number that may be missing, since JSON has only finite ones."""
    return "not finite" if value is None else format(value, form)


def curve(values: list[float], width: int) -> str:
    """Draws values as blocks of eight heights, `width` of them or fewer; each is the mean of neighbours."""
    if len(values) < 2:
        return ""
    columns = min(width, len(values))
    edges = [len(values) * column // columns for column in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if not math.isfinite(high - low) or high == low:
        return BLOCKS[0] * columns
    return "".join(BLOCKS[min(7, int(8 * (mean - low) / (high - low)))] for mean in means)


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _short(number: float) -> str:
    for limit, unit in UNITS:
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:,.0f}"
