"""What every benchmark here shares: the demo corpus, CPU time, and the rows of the table."""

import gzip
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "data" / "demo"
LANGUAGES = {"english": "eng", "chinese": "cmn_Hani"}  # a demo source and datatrove's name of its language


@dataclass
class Result:
    """One row: megabytes a CPU second of both, what to reach, and how far their outcomes agree."""

    step: str
    ours: float
    theirs: float
    wanted: float  # ratio to reach
    peer: str
    agreement: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


def texts(source: str, megabytes: float) -> list[str]:
    """Documents of a demo source, evenly taken, up to about so many megabytes."""
    with gzip.open(DEMO / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
        found = [json.loads(line)["text"] for line in lines]
    step = max(1.0, size_mb(found) / megabytes)
    return [found[int(place * step)] for place in range(int(len(found) / step))]


def size_mb(documents: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in documents) / 1e6


def cpu_seconds(work: Callable[[], Any], times: int = 1) -> float:
    """The median of this process's CPU time, in seconds."""
    spent = []
    for _ in range(times):
        started = time.process_time()
        work()
        spent.append(time.process_time() - started)
    return statistics.median(spent)
