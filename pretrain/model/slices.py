"""Says which slice of a parameter a rank holds: tensor parallel splits one dimension, expert parallel the first."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Slices:
    """Degrees of splitting, and the index of this rank's part. The default is a rank that holds everything."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0

    def global_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        shape = list(parameter.shape)
        for dim, parts, _ in self.splits(parameter):
            shape[dim] *= parts
        return tuple(shape)

    def offset(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Returns the index at which this rank's slice starts in the whole tensor, per dimension."""
        offset = [0] * parameter.ndim
        for dim, _, part in self.splits(parameter):
            offset[dim] = part * parameter.shape[dim]
        return tuple(offset)

    def cut(self, whole: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Returns this rank's slice of `whole`, a tensor of the parameter's global shape."""
        for dim, parts, part in self.splits(parameter):
            whole = whole.chunk(parts, dim)[part]
        return whole

    def splits(self, parameter: nn.Parameter) -> list[tuple[int, int, int]]:
        """Lists every split as (dimension, number of parts, index of this rank's part)."""
        splits = []
        tp_dim = tp_split(parameter)
        if tp_dim is not None:
            splits.append((tp_dim, self.tp, self.tp_rank))
        if self.ep > 1 and is_expert(parameter):
            splits.append((0, self.ep, self.ep_rank))
        return splits


WHOLE = Slices()


def tp_split(parameter: nn.Parameter) -> int | None:
    """Returns the dimension that tensor parallel splits, or None where each of its ranks holds the whole parameter."""
    return getattr(parameter, "partition_dim") if getattr(parameter, "tensor_model_parallel", False) else None  # noqa: B009


def mark_split(parameter: nn.Parameter, is_split: bool, dim: int) -> None:
    """Records whether tensor parallel splits the parameter, and along which dimension.

    The names are megatron-core's and DeepSpeed's, which looks for `tensor_model_parallel` when it takes the grad norm.
    """
    vars(parameter).update(tensor_model_parallel=is_split, partition_dim=dim)


def mark_expert(parameter: nn.Parameter) -> None:
    """Marks a parameter whose first dimension counts experts."""
    vars(parameter)["counts_experts"] = True


def is_expert(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "counts_experts", False)
