"""Goodput of a run: which share of its time, over all of its starts, went into steps that count.

The main rank writes a record of each start into time.json (`pretrain.logs.start_recorder`). `goodput` adds them up:
every second from the first start to the last sign of life belongs to one of `KINDS`. The module imports no torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

FILE = "time.json"

# The kinds of time, by what the train loop did.
KINDS = {
    "training": "steps that count",
    "preparation": "rows and rollouts",
    "first_step": "first step's extra time",
    "evaluation": "evaluation",
    "saving": "wait for checkpoints",
    "checking": "steps computed again",
    "rewinding": "rewinds",
    "end": "last checkpoint and data check",
    "start": "first start",
    "restart": "restarts",
    "lost": "steps done again",
    "hang": "hangs",
    "idle": "not running",
}


@dataclass
class StartRecord:
    """One start of a run. Times are seconds since 1970; `seconds` is how long it did what, by the names of KINDS."""

    began: float
    updated: float
    first_step: int  # steps that were done when it began
    last_step: int
    seconds: dict[str, float] = field(default_factory=dict)


def read(run_dir: str | Path) -> list[StartRecord]:
    """Returns the records of all starts of a run; none for a run of a version that wrote none, or a broken file."""
    try:
        return [StartRecord(**record) for record in json.loads(Path(run_dir, FILE).read_text())["starts"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def goodput(starts: Sequence[StartRecord]) -> dict[str, float]:
    """Returns the seconds of each of KINDS; their sum is the time from the first start to the last sign of life.

    Steps after the checkpoint from which a later start went on were done in vain: they take their part of the time of
    their start's steps.
    """
    total = dict.fromkeys(KINDS, 0.0)
    for index, start in enumerate(starts):
        seconds = dict.fromkeys(KINDS, 0.0) | start.seconds
        if index:
            seconds["restart"], seconds["start"] = seconds["start"], 0.0
        resumed = min((later.first_step for later in starts[index + 1 :]), default=start.last_step)
        done = start.last_step - start.first_step
        share = min(1.0, max(0, start.last_step - resumed) / done) if done else 0.0
        for kind in ("training", "preparation"):
            lost = share * seconds[kind]
            seconds[kind] -= lost
            seconds["lost"] += lost
        total = {kind: total[kind] + seconds[kind] for kind in KINDS}
    if starts:
        total["idle"] = max(0.0, starts[-1].updated - starts[0].began - sum(total.values()))
    return total


def table(starts: Sequence[StartRecord]) -> list[tuple[str, float, float]]:
    """Returns (kind of time in words, seconds, share of the whole) for every kind that took time.

    Shares are rounded to a tenth of a percent so that they add up to 100%: those with the largest rest are rounded up.
    """
    found = {kind: seconds for kind, seconds in goodput(starts).items() if seconds > 0}
    whole = sum(found.values()) or 1.0
    exact = {kind: 1000 * seconds / whole for kind, seconds in found.items()}
    tenths = {kind: int(value) for kind, value in exact.items()}
    by_rest = sorted(exact, key=lambda kind: tenths[kind] - exact[kind])
    for kind in by_rest[: (1000 if found else 0) - sum(tenths.values())]:
        tenths[kind] += 1
    return [(KINDS[kind], found[kind], tenths[kind] / 1000) for kind in found]
