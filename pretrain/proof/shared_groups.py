"""Makes one process group for the same ranks, for processes that join one world after another.

Each gloo group has three threads and its own connections, and some of its threads stay when it is destroyed.
megatron-core makes seventeen groups in any layout, most of which have the same ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

_new_group = dist.new_group
_groups: dict[tuple[Any, ...], Any] = {}


def share_groups() -> None:
    """Makes `torch.distributed.new_group` return the same group for the same ranks until `forget_groups`."""
    dist.new_group = _one_group_for_the_same_ranks


def forget_groups() -> None:
    """Drops the groups of the world that this process leaves."""
    _groups.clear()


def _one_group_for_the_same_ranks(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
    key = (dist.group.WORLD, None if ranks is None else tuple(ranks), kwargs.get("backend"))
    if key not in _groups:
        _groups[key] = _new_group(ranks, *args, **kwargs)
    return _groups[key]
