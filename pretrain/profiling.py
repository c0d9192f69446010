"""`--profile`: traces of some steps by torch's profiler, and a table of what each rank spent their time on.

Written into run.dir/profile/steps_A_to_B: rank_N.json.gz, which chrome://tracing and https://ui.perfetto.dev open, and
on a GPU rank_N_memory.pickle for https://pytorch.org/memory_viz; summary.txt and summary.json have the table. Profiled
steps take longer, so their speed in metrics.jsonl is not a run's. All other numbers stay the same.
"""

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from configs.files import write_atomic
from pretrain.parallel.engine import OPTIMIZER
from pretrain.parallel.groups import Mesh

STEP, DATA = "trivium step", "trivium data"  # what a step and its wait for rows are called in traces
KINDS = ("compute", "communication", "data", "optimizer", "idle")
_MEMORY_EVENTS = 100_000  # allocations that a memory snapshot shows
EXPLANATION = (
    "communication: ranks wait for one another or for the network, and compute nothing meanwhile; data: the step waits",
    "for its rows; optimizer: clipping and Adam; idle: nothing runs (on a CPU, the time between two operations)",
)

Intervals = list[tuple[float, float]]


class Profiler:
    """Context that profiles `steps` (numbers from 1) of a run; all ranks call its methods together.

    `say` is called with the lines of the table.
    """

    def __init__(self, steps: range, run_dir: Path, mesh: Mesh, say: Callable[[str], None]):
        self._steps, self._mesh, self._say = steps, mesh, say
        self._folder = run_dir / "profile" / f"steps_{steps.start}_to_{steps.stop - 1}"
        self._profile: profile | None = None
        self._on_gpu = mesh.device.type == "cuda"
        self._count = 0

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._profile is not None:  # after an error: no other rank may be there to make a table with
            self._profile.stop()

    def step(self, number: int) -> record_function:
        """Returns a context to take step `number` in; profiling begins with the first of `steps`."""
        if number in self._steps:
            if self._profile is None:
                self._start()
            self._count += 1
        return record_function(STEP)

    def end_step(self, number: int) -> None:
        """Ends profiling after the last of `steps`, and writes what was found."""
        if number >= self._steps.stop - 1:
            self.finish()

    def finish(self) -> None:
        """Writes what was found so far, also if not all steps were taken; nothing if none was."""
        if self._profile is None:
            return
        found, self._profile = self._profile, None
        self._folder.mkdir(parents=True, exist_ok=True)
        found.stop()  # waits for a GPU
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"rank_{self._mesh.rank}_memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        path = self._folder / f"rank_{self._mesh.rank}.json.gz"
        found.export_chrome_trace(str(path))
        with gzip.open(path) as file:
            own = time_by_kind(json.load(file)["traceEvents"])
        rows = self._mesh.gather_json(own)
        if self._mesh.is_main:
            lines = table(rows, self._count)
            write_atomic(self._folder / "summary.txt", "\n".join([*lines, *EXPLANATION, ""]).encode())
            write_atomic(self._folder / "summary.json", json.dumps({"steps": self._count, "ranks": rows}).encode())
            self._say(f"profile of {self._count} steps in {self._folder}:\n" + "\n".join(lines))

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        self._profile = profile(activities=activities)
        self._profile.start()


def table(ranks: Iterable[dict[str, float]], steps: int) -> list[str]:
    """Returns the lines of the table of `time_by_kind` of every rank, in milliseconds a step and in percent."""
    lines = [f"{'rank':>4}  {'ms a step':>10}" + "".join(f"{kind:>22}" for kind in KINDS)]
    for rank, found in enumerate(ranks):
        whole = sum(found.values())
        shares = (f"{found[kind] / steps / 1e3:>13,.1f} ({found[kind] / max(whole, 1e-9):>5.1%})" for kind in KINDS)
        lines.append(f"{rank:>4}  {whole / steps / 1e3:>10,.1f}" + "".join(f"{share:>22}" for share in shares))
    return lines


def time_by_kind(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Divides the time of the profiled steps, in microseconds, into KINDS; each moment counts for one of them.

    `events` are those of a Chrome trace. Communication is the time in which a collective runs and nothing is computed.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in timed if event.get("cat") == "user_annotation"]
    steps = [event for event in marks if event["name"] == STEP]
    if not steps:
        return dict.fromkeys(KINDS, 0.0)
    data = _joined(_span(event) for event in marks if event["name"] == DATA)
    gloo = [event for event in marks if event["name"].startswith("gloo:")]
    window = _joined(_span(event) for event in steps)
    if kernels := [event for event in timed if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]:
        # A GPU works on a step after the host is done with it, so its steps have no ends that a trace shows.
        window = [(window[0][0], max(window[-1][1], *(_span(event)[1] for event in kernels)))]
        found = _kinds_on_gpu(timed, kernels, gloo, data)
    else:
        found = _kinds_on_cpu(timed, steps[0]["tid"], gloo, data)
    lengths = {kind: _length(_both(intervals, window)) for kind, intervals in found.items()}
    return lengths | {"idle": max(0.0, _length(window) - sum(lengths.values()))}


def _kinds_on_gpu(
    timed: list[dict[str, Any]], kernels: list[dict[str, Any]], gloo: list[dict[str, Any]], data: Intervals
) -> dict[str, Intervals]:
    """Divides a GPU's time by the kernels that run; it may wait for data only while none does."""
    nccl = [event for event in kernels if "nccl" in event["name"].lower()]
    computing = _joined(_span(event) for event in kernels if "nccl" not in event["name"].lower())
    communication = _minus(_joined(_span(event) for event in [*nccl, *gloo]), computing)
    on_gpu = (event for event in timed if event.get("cat") == "gpu_user_annotation")
    optimizer = _joined(_span(event) for event in on_gpu if event["name"] == OPTIMIZER)
    return {
        "compute": _minus(computing, optimizer),
        "communication": communication,
        "data": _minus(_minus(data, computing), communication),
        "optimizer": _both(computing, optimizer),
    }


def _kinds_on_cpu(
    timed: list[dict[str, Any]], thread: int, gloo: list[dict[str, Any]], data: Intervals
) -> dict[str, Intervals]:
    """Divides a CPU's time by what the thread that takes the steps does; others prepare rows and send messages."""
    own = [event for event in timed if event["tid"] == thread]
    operations = [event for event in own if event.get("cat") == "cpu_op" and "c10d::" not in event["name"]]
    computing = _minus(_joined(_span(event) for event in operations if event["name"].startswith("aten::")), data)
    communication = _minus(_minus(_joined(map(_span, gloo)), computing), data)
    # Functions of autograd and compiled code contain what they call, waits for other ranks among it.
    wrappers = _joined(_span(event) for event in operations if not event["name"].startswith("aten::"))
    computing = _joined([*computing, *_minus(_minus(wrappers, communication), data)])
    optimizer = _joined(_span(event) for event in own if event["name"] == OPTIMIZER)
    optimizer = _minus(_minus(optimizer, communication), data)
    return {
        "compute": _minus(computing, optimizer),
        "communication": communication,
        "data": data,
        "optimizer": optimizer,
    }


def _span(event: dict[str, Any]) -> tuple[float, float]:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])


def _joined(intervals: Iterable[tuple[float, float]]) -> Intervals:
    """Returns the union of intervals, in order and without overlap."""
    joined: Intervals = []
    for first, end in sorted(intervals):
        if joined and first <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((first, end))
    return joined


def _minus(intervals: Intervals, taken: Intervals) -> Intervals:
    """Returns the parts of `intervals` that no interval of `taken` covers; both are in order and without overlap."""
    left: Intervals = []
    next_taken = 0
    for first, end in intervals:
        while next_taken < len(taken) and taken[next_taken][1] <= first:
            next_taken += 1
        at = next_taken
        while at < len(taken) and taken[at][0] < end:
            if taken[at][0] > first:
                left.append((first, taken[at][0]))
            first = max(first, taken[at][1])
            at += 1
        if first < end:
            left.append((first, end))
    return left


def _both(intervals: Intervals, others: Intervals) -> Intervals:
    """Returns the times that two lists of intervals share; both are in order and without overlap."""
    return _minus(intervals, _minus(intervals, others))


def _length(intervals: Intervals) -> float:
    return sum(end - first for first, end in intervals)
