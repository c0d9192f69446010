"""Process groups over gloo for tensors on a GPU: each is copied to the host, exchanged there, and copied back.

NCCL refuses two ranks on one GPU, and gloo itself takes tensors of a GPU in some of its operations only. With these
groups, which `parallel.backend = gloo` asks for, several ranks share one card, so that layouts can be checked where
there is no second one. They are slow: every exchange waits for the device. Tensors on the host go through unchanged.
"""

import datetime
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

NAME = "staged_gloo"

# Operations of a process group with the names that gloo has for them; torch renamed some in 2.13.
_OPERATIONS = {
    **{
        name: name
        for name in (
            "allreduce",
            "allreduce_coalesced",
            "broadcast",
            "reduce",
            "allgather",
            "gather",
            "scatter",
            "reduce_scatter",
            "alltoall",
            "send",
            "recv",
            "recv_anysource",
            "barrier",
        )
    },
    "_allgather_base": "_allgather_base",
    "all_gather_single": "_allgather_base",
    "_reduce_scatter_base": "_reduce_scatter_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "alltoall_base": "alltoall_base",
    "all_to_all_single": "alltoall_base",
}
_WITHOUT_RESULT = ("send", "barrier")  # all others write into the tensors of their first argument


class StagedGloo(dist.ProcessGroup):
    """The group of one rank; torch.distributed calls its methods by the names in `_OPERATIONS`."""

    def __init__(self, gloo: Any, rank: int, size: int):
        super().__init__(rank, size)  # type: ignore[call-arg]  # groups in Python need no store
        self._gloo, self._rank, self._size = gloo, rank, size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:
        return NAME


class StagedWork:
    """An operation that may still be going on; `wait` ends it and copies its results to the device."""

    def __init__(self, work: Any, kept: Any, results: list[tuple[torch.Tensor, torch.Tensor]]):
        self._work, self._kept, self._results = work, kept, results  # gloo does not keep what it sends alive

    def wait(self, timeout: datetime.timedelta | None = None) -> bool:
        """Blocks until the results are there."""
        done = self._work.wait() if timeout is None else self._work.wait(timeout)
        for tensor, on_host in self._results:
            tensor.data.copy_(on_host)  # unseen by autograd, like the writes of NCCL: pipelines receive into leaves
        self._results, self._kept = [], None
        return bool(done)

    def is_completed(self) -> bool:
        """Whether the exchange has ended; results are on the device only after `wait`."""
        return bool(self._work.is_completed())


def needs_copy(tensor: torch.Tensor) -> bool:
    """Whether gloo cannot read the tensor where it is."""
    return tensor.device.type != "cpu"


def _operation(name: str, of_gloo: str) -> Callable[..., StagedWork]:
    def call(self: StagedGloo, *args: Any, **options: Any) -> StagedWork:
        on_host = [_on_host(arg) for arg in args]
        work = getattr(self._gloo, of_gloo)(*on_host, **options)
        results = [] if name in _WITHOUT_RESULT else list(_copied(args[0], on_host[0]))
        return StagedWork(work, on_host, results)

    return call


for _name, _of_gloo in _OPERATIONS.items():
    setattr(StagedGloo, _name, _operation(_name, _of_gloo))


def _on_host(value: Any) -> Any:
    """Returns the argument with a copy on the host in place of every tensor that needs one."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True) if needs_copy(value) else value
    return [_on_host(item) for item in value] if isinstance(value, list) else value


def _copied(value: Any, on_host: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the tensors of an argument that have a copy on the host, each with its copy."""
    if isinstance(value, torch.Tensor):
        if on_host is not value:
            yield value, on_host
    else:
        for item, copy in zip(value, on_host, strict=True):
            yield from _copied(item, copy)


def _create(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> StagedGloo:
    return StagedGloo(dist.ProcessGroupGloo(store, rank, size, timeout=timeout), rank, size)


def register() -> None:
    """Makes the groups known to torch.distributed by their name."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, devices=["cpu", "cuda"])
