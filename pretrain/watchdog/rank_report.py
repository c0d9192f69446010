"""Report of what a rank does at the moment, for the watchdog: its activity, its stacks and its collectives.

Collectives are those of torch's flight recorder, which `groups.start` turns on. NCCL's kernels are in it as gloo's
calls are, but not gloo's messages between two ranks; `message_counts` counts those.
"""

import json
import sys
import threading
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d

from pretrain.watchdog.message_counts import COUNTS

_PROJECT = Path(__file__).parents[2]
# Names of functions on the main thread's stack, by what they say of the step; the first that is on it counts.
PHASES = {
    "backward_step": "backward pass",
    "_engine_run_backward": "backward pass",
    "_forward_step": "forward pass",
    "update": "optimizer's update",
    "sum_partial": "sums of gradients",
}


@dataclass(frozen=True)
class Collective:
    """A collective that a rank entered; `number` counts those of its group from 1, on all of its ranks alike."""

    group: str
    number: int
    operation: str  # such as all_reduce
    sizes: list[list[int]]
    pending: bool


@dataclass(frozen=True)
class RankReport:
    """The state of one rank in a run that makes no progress. Ranks are numbered in the world, not in a group."""

    rank: int
    step: int
    activity: str
    micro_batches: int  # forward passes that the step has begun
    stage: int  # pipeline stage, from 0
    overdue: bool  # whether the activity takes longer than this rank allows it
    phase: str
    location: str  # the innermost line of this project that the main thread is in: file:line in function
    innermost: str  # the innermost line of all
    collectives: list[Collective] = field(default_factory=list)
    groups: dict[str, tuple[str, list[int]]] = field(default_factory=dict)  # name: (what it is for, ranks)
    waiting: dict[str, Any] | None = None  # fields of the PeerMessage that it waits for
    messages: dict[str, int] = field(default_factory=dict)  # number started, by "kind peer"

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "RankReport":
        fields = json.loads(text)
        fields["collectives"] = [Collective(**found) for found in fields["collectives"]]
        fields["groups"] = {name: (purpose, ranks) for name, (purpose, ranks) in fields["groups"].items()}
        return cls(**fields)


def report_of(rank: int, step: int, activity: str, micro_batches: int, stage: int, overdue: bool) -> RankReport:
    """Returns the report of this process, from another thread than its main thread."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    frames = [frame for frame in stack if not Path(frame.filename).is_relative_to(Path(__file__).parent)]
    names = {frame.name for frame in frames}
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PROJECT) and ".venv" not in frame.filename]
    waiting = COUNTS.waiting
    return RankReport(
        rank,
        step,
        activity,
        micro_batches,
        stage,
        overdue,
        next((phase for name, phase in PHASES.items() if name in names), ""),
        _line(own[-1]) if own else "",
        _line(frames[-1]) if frames else "",
        _collectives(),
        _groups(),
        None if waiting is None else asdict(waiting),
        COUNTS.by_name(),
    )


def stacks() -> str:
    """Returns the Python stacks of all threads of this process, as text."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        lines = "".join(traceback.format_stack(frame))
        parts.append(f"Thread {names.get(ident, ident)}:\n{lines}")
    return "\n".join(parts)


def _line(frame: traceback.FrameSummary) -> str:
    path = Path(frame.filename)
    shown = path.relative_to(_PROJECT) if path.is_relative_to(_PROJECT) else Path(*path.parts[-3:])
    return f"{shown}:{frame.lineno} in {frame.name}"


def _collectives() -> list[Collective]:
    dump = _distributed_c10d._dump_fr_trace_json  # type: ignore[attr-defined]  # torch's stubs lack it
    recorded = json.loads(dump(True, False))
    return [
        Collective(
            entry["process_group"][0],
            entry["collective_seq_id"],
            entry["profiling_name"].split(":", 1)[-1],
            entry["input_sizes"],
            not entry["retired"],
        )
        for entry in recorded.get("entries", [])
        if not entry["is_p2p"]
    ]


def _groups() -> dict[str, tuple[str, list[int]]]:
    world = distributed_c10d._world
    found = {}
    for group, name in world.pg_names.items():
        purpose = str(group.group_desc).lower().replace("_", " ")
        found[str(name)] = (purpose, sorted(world.pg_group_ranks[group]))
    return found
