"""Exact, invertible operations between Trivium's tensors and those in a Hugging Face file.

`to_theirs` takes the tensors of a rule's `ours` and returns those of its `theirs`; `to_ours` goes back, and gives bit
for bit what went in. Linear weights are [out, in] in Trivium, stacked experts [E, out, in], biases [out] or [E, out].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from configs.model import ModelConfig

Shape = tuple[int, ...]
Tensors = list[torch.Tensor]


class Operation:
    """Base class of operations, which change the form of tensors without loss; this one leaves tensors as they are."""

    def to_theirs(self, ours: Sequence[torch.Tensor], config: ModelConfig) -> Tensors:
        """Returns the tensors of the file."""
        return list(ours)

    def to_ours(self, theirs: Sequence[torch.Tensor], shapes: Sequence[Shape], config: ModelConfig) -> Tensors:
        """Returns Trivium's tensors, which have the given shapes."""
        return list(theirs)

    def left_over(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Returns the part of the file's tensor that none of Trivium's tensors hold, or None."""
        return None

    def put_back(self, theirs: Tensors, left_over: torch.Tensor) -> Tensors:
        """Returns the tensors of the file with the part that `left_over` returned in its place."""
        return theirs


@dataclass(frozen=True)
class Copy(Operation):
    """Operation that leaves tensors as they are."""


@dataclass(frozen=True)
class Transpose(Operation):
    """Operation for weights that the file keeps as [in, out]."""

    def to_theirs(self, ours: Sequence[torch.Tensor], config: ModelConfig) -> Tensors:
        return [tensor.transpose(-1, -2) for tensor in ours]

    def to_ours(self, theirs: Sequence[torch.Tensor], shapes: Sequence[Shape], config: ModelConfig) -> Tensors:
        return [tensor.transpose(-1, -2) for tensor in theirs]


@dataclass(frozen=True)
class Rotary(Operation):
    """Operation on queries or keys whose rotated elements the file pairs as `layout` names.

    It serves weights, biases and norms of queries and keys, the `first` tensors of a rule or all. Elements that no
    position rotates stay where they are. In latent attention the rotated elements are the last ones of each head, and
    with `shared` those at the end of the latent vector, which all heads share.
    """

    layout: str
    first: int | None = None
    shared: bool = False

    def to_theirs(self, ours: Sequence[torch.Tensor], config: ModelConfig) -> Tensors:
        return self._all_moved(ours, config, config.position.layout, self.layout)

    def to_ours(self, theirs: Sequence[torch.Tensor], shapes: Sequence[Shape], config: ModelConfig) -> Tensors:
        return self._all_moved(theirs, config, self.layout, config.position.layout)

    def _all_moved(self, tensors: Sequence[torch.Tensor], config: ModelConfig, old: str, new: str) -> Tensors:
        if old == new or config.position.kind != "rotary":
            return list(tensors)
        count = len(tensors) if self.first is None else self.first
        return [self._moved(tensor, config, old) for tensor in tensors[:count]] + list(tensors[count:])

    def _moved(self, tensor: torch.Tensor, config: ModelConfig, old: str) -> torch.Tensor:
        width, start, rotated = config.dim_per_head, 0, int(config.dim_per_head * config.position.fraction)
        if latent := config.attention.latent:
            rotated = latent.rope_head_dim
            width = latent.kv_rank + rotated if self.shared else width
            start = width - rotated
        grid = (2, rotated // 2) if old == "halves" else (rotated // 2, 2)
        turned = torch.arange(rotated).view(grid).t().flatten() + start
        order = torch.cat([torch.arange(start), turned, torch.arange(start + rotated, width)])
        return tensor.unflatten(0, (-1, width)).index_select(1, order.to(tensor.device)).flatten(0, 1)


@dataclass(frozen=True)
class Join(Operation):
    """Operation for projections that the file keeps in one tensor, the rows of each after those of the one before it.

    `dim` is the dimension of the rows: 0, or 1 for stacked experts.
    """

    dim: int = 0

    def to_theirs(self, ours: Sequence[torch.Tensor], config: ModelConfig) -> Tensors:
        return [torch.cat(list(ours), self.dim)]

    def to_ours(self, theirs: Sequence[torch.Tensor], shapes: Sequence[Shape], config: ModelConfig) -> Tensors:
        return list(theirs[0].split([shape[self.dim] for shape in shapes], self.dim))


@dataclass(frozen=True)
class Interleave(Operation):
    """Operation for projections of one shape that the file keeps in one tensor, whose rows take turns; see `Join`."""

    dim: int = 0

    def to_theirs(self, ours: Sequence[torch.Tensor], config: ModelConfig) -> Tensors:
        return [torch.stack(list(ours), self.dim + 1).flatten(self.dim, self.dim + 1)]

    def to_ours(self, theirs: Sequence[torch.Tensor], shapes: Sequence[Shape], config: ModelConfig) -> Tensors:
        return list(theirs[0].unflatten(self.dim, (-1, len(shapes))).unbind(self.dim + 1))


@dataclass(frozen=True)
class HeadByHead(Operation):
    """Operation for a joint tensor of queries, keys and values, head after head: its query, its key, its value.

    It serves queries and their gates as well, and any other projections with as many rows as queries.
    """

    def to_theirs(self, ours: Sequence[torch.Tensor], config: ModelConfig) -> Tensors:
        heads = [tensor.unflatten(0, (config.num_heads, -1)) for tensor in ours]
        return [torch.stack(heads, 1).flatten(0, 2)]

    def to_ours(self, theirs: Sequence[torch.Tensor], shapes: Sequence[Shape], config: ModelConfig) -> Tensors:
        heads = theirs[0].unflatten(0, (config.num_heads, len(shapes), -1))
        return [tensor.flatten(0, 1) for tensor in heads.unbind(1)]


@dataclass(frozen=True)
class ByGroup(Operation):
    """Operation for a joint tensor with, of each key-value head, the queries that share it, its key and its value."""

    def groups(self, config: ModelConfig) -> int:
        """Returns the number of key-value heads."""
        return config.num_kv_heads

    def to_theirs(self, ours: Sequence[torch.Tensor], config: ModelConfig) -> Tensors:
        groups = [tensor.unflatten(0, (self.groups(config), -1)) for tensor in ours]
        return [torch.cat(groups, 1).flatten(0, 1)]

    def to_ours(self, theirs: Sequence[torch.Tensor], shapes: Sequence[Shape], config: ModelConfig) -> Tensors:
        groups = theirs[0].unflatten(0, (self.groups(config), -1))
        sizes = [shape[0] // self.groups(config) for shape in shapes]
        return [part.flatten(0, 1) for part in groups.split(sizes, 1)]


@dataclass(frozen=True)
class ByKeyHead(ByGroup):
    """Operation for a joint tensor of a gated delta net: for each key head, its rows of each projection in turn."""

    def groups(self, config: ModelConfig) -> int:
        """Returns the number of key heads."""
        assert config.attention.delta is not None
        return config.attention.delta.num_key_heads


@dataclass(frozen=True)
class Unsqueeze(Operation):
    """Operation for tensors that have one more dimension in the file, `dim`, of size one."""

    dim: int

    def to_theirs(self, ours: Sequence[torch.Tensor], config: ModelConfig) -> Tensors:
        return [tensor.unsqueeze(self.dim) for tensor in ours]

    def to_ours(self, theirs: Sequence[torch.Tensor], shapes: Sequence[Shape], config: ModelConfig) -> Tensors:
        return [tensor.squeeze(self.dim) for tensor in theirs]


@dataclass(frozen=True)
class SplitExperts(Operation):
    """Operation for experts that Trivium stacks and the file keeps one by one; the file's names say `{expert}`."""

    def to_theirs(self, ours: Sequence[torch.Tensor], config: ModelConfig) -> Tensors:
        return [expert for stacked in ours for expert in stacked.unbind(0)]

    def to_ours(self, theirs: Sequence[torch.Tensor], shapes: Sequence[Shape], config: ModelConfig) -> Tensors:
        count = len(theirs) // len(shapes)
        return [torch.stack(list(theirs[i * count : (i + 1) * count])) for i in range(len(shapes))]


@dataclass(frozen=True)
class RowOffset(Operation):
    """Operation for a table whose first `rows` rows belong to no position: zeros, unless an import kept them."""

    rows: int

    def to_theirs(self, ours: Sequence[torch.Tensor], config: ModelConfig) -> Tensors:
        return [torch.cat([tensor.new_zeros(self.rows, *tensor.shape[1:]), tensor]) for tensor in ours]

    def to_ours(self, theirs: Sequence[torch.Tensor], shapes: Sequence[Shape], config: ModelConfig) -> Tensors:
        return [tensor[self.rows :] for tensor in theirs]

    def left_over(self, theirs: Sequence[torch.Tensor]) -> torch.Tensor | None:
        return theirs[0][: self.rows]

    def put_back(self, theirs: Tensors, left_over: torch.Tensor) -> Tensors:
        return [torch.cat([left_over.to(theirs[0].dtype), theirs[0][self.rows :]])]


@dataclass(frozen=True)
class Chain(Operation):
    """Operation made of several ones, in the order from Trivium's tensors to the file's."""

    steps: tuple[Operation, ...]

    def to_theirs(self, ours: Sequence[torch.Tensor], config: ModelConfig) -> Tensors:
        tensors = list(ours)
        for step in self.steps:
            tensors = step.to_theirs(tensors, config)
        return tensors

    def to_ours(self, theirs: Sequence[torch.Tensor], shapes: Sequence[Shape], config: ModelConfig) -> Tensors:
        before = [list(shapes)]
        for step in self.steps[:-1]:
            before.append(their_shapes(step, before[-1], config))
        tensors = list(theirs)
        for step, wanted in zip(reversed(self.steps), reversed(before), strict=True):
            tensors = step.to_ours(tensors, wanted, config)
        return tensors


def chain(*steps: Operation) -> Chain:
    """Returns the operations one after another, in the order from Trivium's tensors to the file's."""
    return Chain(steps)


def their_shapes(operation: Operation, shapes: Sequence[Shape], config: ModelConfig) -> list[Shape]:
    """Returns the shapes of the file's tensors that an operation makes from Trivium's tensors of these shapes."""
    made = operation.to_theirs([torch.empty(shape, device="meta") for shape in shapes], config)
    return [tuple(tensor.shape) for tensor in made]
