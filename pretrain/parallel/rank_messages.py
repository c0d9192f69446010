"""Sends JSON values and arrays between ranks over gloo: in a given group of all ranks, or in the default one.

Nothing is unpickled. Tensors are sent by torch.distributed itself.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def gather_json(value: Any, group: dist.ProcessGroup | None = None, everywhere: bool = True) -> list[Any]:
    """Returns all ranks' values in rank order; unless `everywhere`, rank 0 alone gets them and others an empty list."""
    data = _bytes(value)
    world_size = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
    padded[: len(data)] = data
    here = everywhere or dist.get_rank(group) == 0
    parts = [torch.empty_like(padded) for _ in range(world_size)] if here else []
    if everywhere:
        dist.all_gather(parts, padded, group=group)
    else:
        dist.gather(padded, parts or None, dst=0, group=group)
    return [json.loads(part[: int(n)].numpy().tobytes()) for part, n in zip(parts, lengths, strict=here)]


def gather_rows(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns, on every rank, all ranks' rows of each array in rank order.

    The arrays have the same names, types and shapes on all ranks but for their first dimension, which may be 0.
    """
    counts = gather_json({name: len(array) for name, array in arrays.items()})
    found = {}
    for name, array in arrays.items():
        lengths = [count[name] for count in counts]
        padded = np.zeros((max(lengths), *array.shape[1:]), array.dtype)
        padded[: len(array)] = array
        own = torch.from_numpy(padded.reshape(-1).view(np.uint8))
        parts = [torch.empty_like(own) for _ in counts]
        if own.numel():
            dist.all_gather(parts, own)
        rows = [
            part.numpy().view(array.dtype).reshape(padded.shape)[:n] for part, n in zip(parts, lengths, strict=True)
        ]
        found[name] = np.concatenate(rows)
    return found


def broadcast_json(value: Any, group: dist.ProcessGroup) -> Any:
    """Returns rank 0's value on every rank."""
    data = _bytes(value)
    length = torch.tensor([len(data)])
    dist.broadcast(length, 0, group=group)
    if dist.get_rank(group) != 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, 0, group=group)
    return json.loads(data.numpy().tobytes())


def _bytes(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
