"""Shared parts of the benchmarks: the demo corpus, CPU time, facts of the machine, and rows of the table.

Clocks count CPU seconds of this process and of processes that it started and waited for. Start-up stays outside the
clock on both sides: imports, our compiled code from numba's cache, datatrove's spaCy, jieba and language models are
all loaded by a first call on other text. Inside on both sides: everything that a step does again for each run, such as
planning tasks, opening and publishing files. Leaves out waiting for disks and networks.
"""

import datetime
import gzip
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "data" / "demo"
LANGUAGES = {"english": "eng", "chinese": "cmn_Hani"}  # demo source -> datatrove's name of its language


@dataclass
class Result:
    """One row of the table: megabytes of text, CPU seconds of Trivium and the peer, and how far their results agree.

    A row without a peer measures one of our stages alone.
    """

    step: str
    megabytes: float
    seconds: float
    peer_seconds: float | None = None
    wanted: float | None = None  # ratio to reach
    peer: str = ""
    agreement: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.megabytes / self.seconds

    @property
    def peer_rate(self) -> float | None:
        return self.megabytes / self.peer_seconds if self.peer_seconds else None

    @property
    def ratio(self) -> float | None:
        return self.peer_seconds / self.seconds if self.peer_seconds else None

    def plain(self) -> dict[str, Any]:
        rates = {"mb_per_s": self.rate, "peer_mb_per_s": self.peer_rate, "ratio": self.ratio}
        return vars(self) | rates


def machine() -> dict[str, Any]:
    """Returns the facts of this machine and its packages that the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ("datatrove", "numba", "trafilatura", "Resiliparse", "sentencepiece", "spacy", "jieba")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),  # mean number of processes that could run, over the last minute
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def texts(source: str, megabytes: float) -> list[str]:
    """Returns about `megabytes` of documents of a demo source, taken at equal distances."""
    with gzip.open(DEMO / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
        found = [json.loads(line)["text"] for line in lines]
    return spread(found, [len(text.encode()) for text in found], megabytes)


def size_mb(documents: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in documents) / 1e6


def spread(items: Sequence[Any], sizes: Sequence[int], megabytes: float) -> list[Any]:
    """Returns about `megabytes` of `items`, taken at equal distances; `sizes` are in bytes."""
    step = max(1.0, sum(sizes) / 1e6 / megabytes)
    return [items[int(index * step)] for index in range(int(len(items) / step))]


def cpu_seconds(work: Callable[[], Any], times: int = 1) -> float:
    """Returns the median CPU time of `work` over `times` calls, in seconds."""
    spent = []
    for _ in range(times):
        started = _cpu()
        work()
        spent.append(_cpu() - started)
    return statistics.median(spent)


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
