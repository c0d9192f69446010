"""Says which slice of a parameter a rank holds: tensor parallel splits one dimension, expert parallel the first.

A slice may be padded with zeros at its end, where a dimension does not divide by tp, and several neighbouring ranks of
tensor parallel may hold the same slice, where there are fewer slices than ranks. Padding is in no whole tensor: not in
checkpoints, and not in exports.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class TensorSplit:
    """The way in which tensor parallel splits a parameter over `dim`.

    `size` is the whole dimension's, without padding. `copies` neighbouring ranks hold the same slice.
    """

    dim: int
    size: int
    copies: int = 1


@dataclass(frozen=True)
class Slices:
    """Degrees of splitting, and the index of this rank's part. The default is a rank that holds everything."""

    tp: int = 1
    tp_rank: int = 0
    ep: int = 1
    ep_rank: int = 0

    def global_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Returns the shape of the whole tensor."""
        shape = list(parameter.shape)
        for dim, _, size in self._splits(parameter):
            shape[dim] = size
        return tuple(shape)

    def offset(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Returns the index at which this rank's slice starts in the whole tensor, per dimension."""
        offset = [0] * parameter.ndim
        for dim, part, size in self._splits(parameter):
            offset[dim] = min(size, part * parameter.shape[dim])
        return tuple(offset)

    def shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        """Returns the shape of this rank's slice without padding; a slice of padding alone has no elements."""
        whole, offset = self.global_shape(parameter), self.offset(parameter)
        return tuple(min(own, size - first) for own, size, first in zip(parameter.shape, whole, offset, strict=True))

    def cut(self, whole: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Returns this rank's slice, padded, of `whole`, a tensor of the parameter's global shape."""
        offset, shape = self.offset(parameter), self.shape(parameter)
        for dim, _, _ in self._splits(parameter):
            whole = whole.narrow(dim, offset[dim], shape[dim])
        return _padded(whole, parameter.shape) if shape != tuple(parameter.shape) else whole

    def without_padding(self, slice_: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Returns `slice_`, this rank's part of a tensor that is split like `parameter`, without its padding."""
        for dim, size in enumerate(self.shape(parameter)):
            slice_ = slice_.narrow(dim, 0, size)
        return slice_

    def _splits(self, parameter: nn.Parameter) -> list[tuple[int, int, int]]:
        """Lists every split as (dimension, index of this rank's part, size of the whole dimension)."""
        splits = []
        split = tp_split(parameter)
        if split is not None:
            splits.append((split.dim, self.tp_rank // split.copies, split.size))
        if self.ep > 1 and is_expert(parameter):
            splits.append((0, self.ep_rank, self.ep * parameter.shape[0]))
        return splits


WHOLE = Slices()


def _padded(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Appends zeros to every dimension up to `shape`."""
    missing = [(0, own - present) for own, present in zip(shape, tensor.shape, strict=True)]
    return F.pad(tensor, [n for pair in reversed(missing) for n in pair])


def tp_split(parameter: nn.Parameter) -> TensorSplit | None:
    """Returns how tensor parallel splits a parameter, or None where each of its ranks holds the whole parameter."""
    return getattr(parameter, "split_over_tp", None)


def mark_split(parameter: nn.Parameter, split: TensorSplit | None) -> None:
    """Records how tensor parallel splits the parameter.

    DeepSpeed looks for `tensor_model_parallel` when it takes the grad norm; megatron-core's layers have set it.
    """
    vars(parameter).update(split_over_tp=split, tensor_model_parallel=split is not None)


def mark_expert(parameter: nn.Parameter) -> None:
    """Marks a parameter whose first dimension counts experts."""
    vars(parameter)["counts_experts"] = True


def is_expert(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "counts_experts", False)
