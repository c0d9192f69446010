"""Shares of a step's time in matrix products, attention, loss, optimizer, communication, all else, and idle.

Optimizer, communication and idle are those of `--profile`: clipping and Adam, waits for other ranks, and moments in
which no operation runs. Products are all matrix products, the head's among them. Attention is its kernel without the
projections. Loss is what follows the head's product. In compiled code of a peer the loss is one with other operations
and counts as "other": norms, rotation, activations, additions and copies.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import record_function

from pretrain.model.head_loss import HeadLoss
from pretrain.parallel.engine import OPTIMIZER
from pretrain.profiling import STEP, time_by_kind

LOSS = "benchmark loss"  # what Trivium's head with its loss is called in traces
# The beginnings of the names of operations. What an operation calls belongs to it, but for products.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm")
WHOLE = {
    "attention": (
        "aten::_scaled_dot_product",
        "aten::scaled_dot_product",
        "trivium::causal_documents",
        "trivium_native::causal_backward",
    ),
    "loss": (LOSS, "aten::_log_softmax", "aten::nll_loss", "aten::cross_entropy", "aten::log_softmax"),
}
PARTS = ("products", "attention", "loss", "optimizer", "communication", "other", "idle")


def shares(step: Callable[[int], float], documents: int) -> dict[str, float]:
    """Takes a step under torch's profiler and returns the share of its time in each part; together they are 1."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _loss_marked(), torch.profiler.profile(activities=activities) as profile, record_function(STEP):
        step(documents)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        return shares_of(json.loads(path.read_text())["traceEvents"])


def shares_of(events: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Divides the step in the events of a Chrome trace into `PARTS`."""
    events = [event for event in events if event.get("ph") == "X"]
    kinds = time_by_kind(events)
    (step,) = (event for event in events if event["name"] == STEP and event.get("cat") == "user_annotation")
    spent = dict.fromkeys(("products", "attention", "loss"), 0.0)
    for part, microseconds in _own_times(event for event in events if event["tid"] == step["tid"]):
        if part in spent:
            spent[part] += microseconds
    spent |= {"optimizer": kinds["optimizer"], "communication": kinds["communication"], "idle": kinds["idle"]}
    whole = sum(kinds.values())
    spent["other"] = max(0.0, whole - sum(spent.values()))
    return {part: round(spent[part] / whole, 4) for part in PARTS}


def _own_times(events: Iterable[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yields the part of each event of a thread and its time in microseconds without that of the events within it."""
    within: list[tuple[float, str, list[float]]] = []  # end, part and own time of the events that are open
    done: list[tuple[str, list[float]]] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        start, length = float(event["ts"]), float(event["dur"])
        while within and within[-1][0] <= start:
            within.pop()
        around = within[-1][1] if within else "other"
        if within:
            within[-1][2][0] -= length
        opened = (start + length, _part(event["name"], around), [length])
        within.append(opened)
        if event.get("cat") != "user_annotation":  # between its operations nothing runs
            done.append(opened[1:])
    for part, own in done:
        yield part, own[0]


def _part(name: str, around: str) -> str:
    if around == "optimizer" or name == OPTIMIZER:
        return "optimizer"
    if name.startswith(PRODUCTS) and around != "attention":
        return "products"
    return next((part for part, names in WHOLE.items() if name.startswith(names)), around)


@contextmanager
def _loss_marked() -> Iterator[None]:
    call = HeadLoss.__call__

    def marked(self: HeadLoss, *args: Any, **kwargs: Any) -> torch.Tensor:
        with record_function(LOSS):
            return call(self, *args, **kwargs)

    with mock.patch.object(HeadLoss, "__call__", marked):
        yield
