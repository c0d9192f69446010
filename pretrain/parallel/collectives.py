"""Reduce-scatter and all-gather of a flat tensor, of which each rank of a group owns an equal part, in the background.

On GPUs they are NCCL's own. gloo's are slow: its reduce-scatter is an all-reduce of a copy, twice the volume, and its
all-gather goes through two copies more. On a CPU each rank therefore sends every other rank its part directly. Sums
are taken in the order of ranks, so that they do not depend on which rank takes them.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pretrain.model import flat_collectives


class Pending(Protocol):
    """A collective that was started. Its tensors may be neither read nor written before `wait` returns."""

    def wait(self) -> Any: ...


class _Messages:
    """Messages that this rank and all others of a group exchange; `then` is called once all have arrived."""

    def __init__(self, works: list[dist.Work | None], then: Callable[[], Any] | None = None):
        self._works, self._then = works, then

    def wait(self) -> None:
        for work in self._works:
            assert work is not None, "a rank outside of a group takes part in none of its collectives"
            work.wait()
        if self._then is not None:
            self._then()


def own_part(flat: torch.Tensor, group: dist.ProcessGroup) -> slice:
    """Returns the range of `flat` that this rank owns. The group's size divides its length."""
    numel = len(flat) // dist.get_world_size(group)
    first = dist.get_rank(group) * numel
    return slice(first, first + numel)


def sends_parts(flat: torch.Tensor) -> bool:
    """Returns whether ranks send each other their parts of `flat` directly, as on a CPU."""
    return flat.is_cpu


def start_reduce_scatter(flat: torch.Tensor, group: dist.ProcessGroup, tag: int) -> Pending:
    """Starts summing `flat` over the group; this rank's own part of it becomes the sum, and the rest is scratch.

    Ranks start the collectives of a group in the same order. Those under way at once need different tags.
    """
    own = flat[own_part(flat, group)]
    if not sends_parts(flat):
        return flat_collectives.reduce_scatter(own, flat, group=group, async_op=True)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    parts[dist.get_rank(group)] = own
    works = _exchange(list(flat.view(len(parts), -1)), parts, group, tag)
    return _Messages(works, lambda: _add_up(parts, own))


def start_all_gather(flat: torch.Tensor, group: dist.ProcessGroup, tag: int) -> Pending:
    """Starts filling `flat` with the parts that the other ranks own; see `start_reduce_scatter`."""
    own = flat[own_part(flat, group)]
    if not sends_parts(flat):
        return flat_collectives.all_gather(flat, own, group=group, async_op=True)
    parts = list(flat.view(dist.get_world_size(group), -1))
    return _Messages(_exchange([own] * len(parts), parts, group, tag))


def _exchange(
    sent: list[torch.Tensor], received: list[torch.Tensor], group: dist.ProcessGroup, tag: int
) -> list[dist.Work | None]:
    """Starts sending `sent[r]` to each other rank r of the group and filling `received[r]` with what r sends here."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    others = [(rank + distance) % size for distance in range(1, size)]  # no two ranks begin with the same one
    works = [dist.irecv(received[other], group=group, group_src=other, tag=tag) for other in reversed(others)]
    return works + [dist.isend(sent[other], group=group, group_dst=other, tag=tag) for other in others]


def _add_up(parts: list[torch.Tensor], own: torch.Tensor) -> None:
    """Adds up all ranks' `parts` in order of rank into `own`, which is one of them."""
    total = parts[0]
    for part in parts[1:-1]:
        total.add_(part)
    torch.add(total, parts[-1], out=own)
