"""Says which slice of a parameter a rank holds: tensor parallel splits one dimension, expert parallel the first.

A slice may be padded with zeros at its end, where a dimension does not divide by tp, and several neighbouring ranks of
tensor parallel may hold the same slice, where there are fewer slices than ranks. Padding is in no whole tensor: not in
checkpoints, and not in exports.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class TensorSplit:
    """Description of how tensor parallel splits a parameter along the dimension `dim`.

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


Partial = Literal["never", "sequence", "heads"]


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Facts of a parameter, said once, where it is made, and read by init, ZeRO, gradient sums and checkpoints.

    `partial` says when tensor-parallel ranks that hold the same weight have different parts of its gradient: "never",
    under "sequence" parallel, since each sees its part of the sequence, or always, since each sees its own "heads".
    `on_every_stage` says that every pipeline stage holds the weight and uses it for its own layers, so that each has a
    part of its gradient. The initial weight is `constant`, or the logarithm of a number drawn evenly between those of
    `log_of`, or where both are None normal with the deviation `std`, or where that is None too `std_factor` times the
    model's init_std.
    """

    split: TensorSplit | None = None
    is_expert: bool = False  # the first dimension counts experts
    partial: Partial = "never"
    constant: float | None = None
    log_of: tuple[float, float] | None = None
    std_factor: float = 1.0
    std: float | None = None
    decays: bool = True  # whether weight decay applies
    on_every_stage: bool = False


def mark(parameter: nn.Parameter, marks: Marks) -> None:
    """Attaches `marks` to a parameter: how it is split, drawn and updated.

    DeepSpeed looks for `tensor_model_parallel` when it takes the grad norm; megatron-core's layers have set it.
    """
    vars(parameter).update(marks=marks, tensor_model_parallel=marks.split is not None)


def marks_of(parameter: nn.Parameter) -> Marks:
    """Returns the marks of a parameter. Raises AttributeError if it has none, which is a bug."""
    known: Any = parameter
    return known.marks


def tp_split(parameter: nn.Parameter) -> TensorSplit | None:
    """Returns how tensor parallel splits a parameter, or None where each of its ranks holds the whole parameter."""
    return marks_of(parameter).split


def is_expert(parameter: nn.Parameter) -> bool:
    """Returns whether the parameter's first dimension counts experts."""
    return marks_of(parameter).is_expert
