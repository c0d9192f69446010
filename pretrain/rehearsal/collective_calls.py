"""Records what a rank asks of its process groups in a training step: every collective, and every message to a peer.

Calls are seen where all of torch's functions and libraries end, at the methods of `torch.distributed.ProcessGroup`. So
the same record is made of a rank over gloo or NCCL and of one that is rehearsed.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from pretrain.watchdog.rank_report import PHASES

PASSES = ("forward pass", "backward pass")
_PROJECT = Path(__file__).parents[2]
_OWN = tuple(str(_PROJECT / folder) for folder in ("pretrain", "posttrain"))
Describe = Callable[[dist.ProcessGroup, Sequence[Any]], dict[str, Any]]


@dataclass(frozen=True)
class Group:
    """A process group: what it is for, and its ranks in the world."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        if len(self.ranks) > 4:
            ranks = f"{self.ranks[0]}, {self.ranks[1]}, ... {self.ranks[-1]}"
        else:
            ranks = ", ".join(map(str, self.ranks))
        return f"the {self.name} group of ranks {ranks}"


@dataclass(frozen=True)
class GroupCall:
    """A call of a process group. `numel` is the number of elements that this rank puts in, or gets from a peer.

    `peer` is the rank in the world of the other end of a message, or the root of a broadcast. `sent` and `received` are
    the elements that an all-to-all exchanges with each rank of the group. `phase` and `location` say where in the step.
    """

    group: Group
    operation: str
    dtype: str
    numel: int
    bytes: int
    on_host: bool
    peer: int | None = None
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()
    phase: str = ""
    location: str = ""

    @property
    def is_message(self) -> bool:
        return self.operation in ("send", "recv")

    @property
    def is_of_micro_batch(self) -> bool:
        """Whether every micro-batch makes the call again, unlike those that a step makes once."""
        if self.is_message and self.group.name == "pp":
            return True
        return self.phase in PASSES and not self.group.name.startswith(("dp", "expert-dp"))

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends by the usual algorithms, in which each byte crosses a link as rarely as it can.

        They are rings for all-reduce, all-gather and reduce-scatter, and direct messages for the rest.
        """
        size, own = len(self.group.ranks), self.bytes
        match self.operation:
            case "all_reduce":
                return 2 * own * (size - 1) // size
            case "all_gather":
                return own * (size - 1)
            case "reduce_scatter":
                return own * (size - 1) // size
            case "all_to_all":
                return own - own * self.sent[_index(self)] // max(1, self.numel) if self.sent else own
            case "recv" | "barrier":
                return 0
        return own

    def __str__(self) -> str:
        if self.operation == "barrier":
            return "barrier"
        peer = {"send": f" to rank {self.peer}", "recv": f" from rank {self.peer}"}.get(self.operation, "")
        return f"{self.operation} of {self.numel:,} {self.dtype}{peer}"


def _index(call: GroupCall) -> int:
    """Returns the index in its group of the rank that called an all-to-all; the recorder keeps it in `peer`."""
    assert call.peer is not None
    return call.group.ranks.index(call.peer)


@contextlib.contextmanager
def recorded(names: dict[int, str], calls: list[GroupCall] | None = None) -> Iterator[list[GroupCall]]:
    """Context manager that yields the list of calls of this process from here on, or adds them to `calls`.

    `names` are names of process groups by their identity; others go by torch's description. Equal calls are one object,
    since the micro-batches of a step make the same ones.
    """
    calls = [] if calls is None else calls
    known: dict[GroupCall, GroupCall] = {}
    groups: dict[int, tuple[dist.ProcessGroup, Group]] = {}

    def group_of(group: dist.ProcessGroup) -> Group:
        if id(group) not in groups:
            name = names.get(id(group)) or group.group_desc.lower().replace("_", " ").removesuffix(" group")
            groups[id(group)] = group, Group(name, tuple(dist.get_process_group_ranks(group)))
        return groups[id(group)][1]

    def recording(method: Any, operation: str, describe: Describe) -> Any:
        @functools.wraps(method)
        def call(group: Any, *args: Any, **options: Any) -> Any:
            if not inside:
                phase, location = _position()
                made = GroupCall(group_of(group), operation, **describe(group, args), phase=phase, location=location)
                calls.append(known.setdefault(made, made))
            inside.append(True)
            try:
                return method(group, *args, **options)
            finally:
                inside.pop()

        return call

    inside: list[bool] = []  # a method may be made of another one
    with contextlib.ExitStack() as stack:
        for name, (operation, describe) in _METHODS.items():
            if hasattr(dist.ProcessGroup, name):
                method = recording(getattr(dist.ProcessGroup, name), operation, describe)
                stack.enter_context(mock.patch.object(dist.ProcessGroup, name, method))
        yield calls


def _position() -> tuple[str, str]:
    """Returns the phase of the step that this thread is in, and the innermost project line on its stack."""
    frame, location, phase = sys._getframe(2), "", ""
    while frame is not None and not (location and phase):
        code = frame.f_code
        # A function mode, in which torch's own functions are called, is no line of the step.
        if not location and code.co_filename.startswith(_OWN) and code.co_name != "__torch_function__":
            location = f"{Path(code.co_filename).relative_to(_PROJECT)}:{frame.f_lineno}"
        phase = phase or PHASES.get(code.co_name, "")
        frame = frame.f_back  # type: ignore[assignment]
    return phase, location


def _of(tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
    first = tensors[0]
    numel = sum(tensor.numel() for tensor in tensors)
    return {
        "dtype": str(first.dtype).removeprefix("torch."),
        "numel": numel,
        "bytes": numel * first.element_size(),
        "on_host": first.is_cpu,
    }


def _flat(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else [one for part in tensors for one in _flat(part)]


def _argument(index: int) -> Describe:
    return lambda group, args: _of(_flat(args[index]))


def _message(group: dist.ProcessGroup, args: Sequence[Any]) -> dict[str, Any]:
    return {**_of(_flat(args[0])), "peer": dist.get_global_rank(group, args[1])}


def _rooted(group: dist.ProcessGroup, args: Sequence[Any]) -> dict[str, Any]:
    return {**_of(_flat(args[0])), "peer": dist.get_global_rank(group, args[1].rootRank)}


def _exchange(group: dist.ProcessGroup, args: Sequence[Any]) -> dict[str, Any]:
    output, given, received, sent = args[:4]

    def elements(tensor: torch.Tensor, rows: Sequence[int]) -> tuple[int, ...]:
        size = group.size()
        width = tensor.numel() // max(1, len(tensor))
        return tuple(n * width for n in rows) if rows else (tensor.numel() // size,) * size

    own = dist.get_global_rank(group, group.rank())
    return {**_of([given]), "peer": own, "sent": elements(given, sent), "received": elements(output, received)}


def _exchanged_list(group: dist.ProcessGroup, args: Sequence[Any]) -> dict[str, Any]:
    received, sent = (tuple(tensor.numel() for tensor in _flat(part)) for part in args[:2])
    return {
        **_of(_flat(args[1])),
        "peer": dist.get_global_rank(group, group.rank()),
        "sent": sent,
        "received": received,
    }


def _nothing(group: dist.ProcessGroup, args: Sequence[Any]) -> dict[str, Any]:
    return {"dtype": "", "numel": 0, "bytes": 0, "on_host": True}


# Methods by name: what the operation is called, and how their arguments are read. Versions of torch have some of them.
_METHODS: dict[str, tuple[str, Describe]] = {
    "allreduce": ("all_reduce", _argument(0)),
    "allreduce_coalesced": ("all_reduce", _argument(0)),
    "broadcast": ("broadcast", _rooted),
    "reduce": ("reduce", _rooted),
    "allgather": ("all_gather", _argument(1)),
    "_allgather_base": ("all_gather", _argument(1)),
    "all_gather_single": ("all_gather", _argument(1)),
    "reduce_scatter": ("reduce_scatter", _argument(1)),
    "_reduce_scatter_base": ("reduce_scatter", _argument(1)),
    "reduce_scatter_single": ("reduce_scatter", _argument(1)),
    "alltoall_base": ("all_to_all", _exchange),
    "all_to_all_single": ("all_to_all", _exchange),
    "alltoall": ("all_to_all", _exchanged_list),
    "barrier": ("barrier", _nothing),
    "send": ("send", _message),
    "recv": ("recv", _message),
}
