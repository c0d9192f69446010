"""ZeRO stage 1 (Rajbhandari et al. 2020) on flat buckets, as in Megatron's distributed optimizer.

Parameters of one data-parallel group are put into buckets, in the order in which the backward pass finishes them. Every
rank of the group owns an equal part of each bucket. A step, in any precision:

1. Gradients are accumulated over micro-batches in fp32 (in fp64 for fp64 weights): the first micro-batch's are copied
   over those of the step before, and later ones are added.
2. As soon as the last micro-batch's backward has finished a bucket, its sum over the group is reduce-scattered, while
   backward goes on with the buckets after it.
3. The gradient norm is taken over the parts that ranks own, and AdamW updates the fp32 master weights of these parts.
   It scales gradients down as clipping demands, and leaves everything as it was if the norm is not finite.
4. As soon as a bucket is updated, its new weights are gathered in the model's precision, while the buckets after it
   are updated and the next step's rows are prepared. A layer waits for its weights before it computes.

Everything else that reads the model's weights calls `wait_for_weights` first. Left out: splitting gradients or weights
between steps (stages 2 and 3, see `zero`).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.train import OptimizerConfig
from pretrain.model.cache_parts import in_parts
from pretrain.model.slices import is_expert, marks_of
from pretrain.parallel.collectives import Pending, own_part, start_all_gather, start_reduce_scatter
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage

# In elements. Large enough to use a network well, small enough that most of backward is left when the first is full.
BUCKET_SIZE = 2**23
# Parts begin at multiples of so many elements, which vector instructions and fused kernels want.
ALIGNMENT = 64
# In elements. A CPU adds up so many squares in fp32, and all beyond in fp64: a sum in fp64 alone would copy all first.
NORM_ROW = 256


@dataclass(frozen=True)
class Fragment:
    """The range of a flattened parameter whose fp32 state this rank owns, and its position in the rank's partitions."""

    start: int
    numel: int
    partition: int  # index in `master_partitions`
    offset: int  # of the range, from the partition's first element


@dataclass
class Bucket:
    """Parameters that are reduced together, flat and one after the other, padded to equal parts.

    `weights` [size], in the model's precision, holds the parameters' own elements; `gradients` [size] is what was
    accumulated. `master` [size / ranks] is the part whose fp32 weights this rank owns; for fp32 weights it is a view of
    `weights`.
    """

    index: int
    parameters: list[nn.Parameter]
    group: dist.ProcessGroup
    decayed: bool
    weights: torch.Tensor
    gradients: torch.Tensor
    master: torch.Tensor
    counted: list[tuple[int, int]]  # ranges of this rank's part that count in the gradient norm
    # Parameters, by identity, whose part of `gradients` is still that of the step before.
    outdated: dict[int, nn.Parameter] = field(default_factory=dict, repr=False)
    waits_for: int = 0  # number of gradients that the step's backward passes have still to make
    reduction: Pending | None = field(default=None, repr=False)
    gathering: Pending | None = field(default=None, repr=False)

    @property
    def own(self) -> slice:
        """The part of `weights` and of `gradients` that this rank owns."""
        return own_part(self.weights, self.group)

    @property
    def own_gradients(self) -> torch.Tensor:
        """Gradients [size / ranks] of the part that this rank owns, summed over the group after `finish`."""
        return self.gradients[self.own]

    @property
    def is_shared(self) -> bool:
        """Whether other ranks hold the same weights, so that gradients are summed and weights gathered."""
        return dist.get_world_size(self.group) > 1

    def start_reduction(self) -> None:
        for parameter in self.outdated.values():  # no micro-batch used it
            _gradient_in_bucket(parameter).zero_()
        self.outdated.clear()
        if self.is_shared:
            self.reduction = start_reduce_scatter(self.gradients, self.group, tag=2 * self.index)

    def wait_for_gradients(self) -> None:
        """Waits until `own_gradients` are summed."""
        if self.reduction is not None:
            self.reduction.wait()
            self.reduction = None

    def start_gathering(self) -> None:
        """Starts an all-gather of the bucket's weights: each rank sends its part, copied from its master weights."""
        self.wait_for_weights()
        part = self.weights[self.own]
        if part.data_ptr() != self.master.data_ptr():
            part.copy_(self.master)
        if self.is_shared:
            self.gathering = start_all_gather(self.weights, self.group, tag=2 * self.index + 1)

    def wait_for_weights(self) -> None:
        """Waits until `weights` are those of the last update on every rank."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None


def changes_weights(norm: torch.Tensor, largest_norm: torch.Tensor | float) -> torch.Tensor:
    """Returns, as a boolean on the device, whether a step whose gradient has this norm changes weights."""
    return norm.isfinite() & (norm <= largest_norm)


class DistributedOptimizer:
    """AdamW for a pipeline rank's parameters, with fp32 master weights and moments split over data parallel.

    The parameters become views of the buckets' `weights`.
    """

    def __init__(self, stage: PipelineStage, config: OptimizerConfig, mesh: Mesh):
        self._mesh, self._clip_grad = mesh, config.clip_grad
        self.buckets: list[Bucket] = []
        self._next_to_reduce = 0
        # [2] if the next step shall measure it: squares of the update and of the weights before, of this rank's parts.
        self.squares_of_update: torch.Tensor | None = None
        for parameters, decayed in _in_order_of_backward(stage):
            self._add(parameters, decayed)
        self.adam = torch.optim.AdamW(
            [
                {
                    "params": [bucket.master for bucket in self.buckets if bucket.decayed == decayed],
                    "weight_decay": config.weight_decay if decayed else 0.0,
                }
                for decayed in (True, False)
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        for module, needed in _in_order_of_use(stage):
            used = {id(bucket): bucket for bucket, _ in map(_location, filter(is_in_bucket, needed))}
            module.register_forward_pre_hook(partial(_wait, list(used.values())))

    def begin(self, num_microbatches: int) -> None:
        """Drops the gradients of the step before, and expects one backward pass for each micro-batch."""
        self._next_to_reduce = 0
        self.wait_for_weights()
        for bucket in self.buckets:
            bucket.outdated = {id(parameter): parameter for parameter in bucket.parameters}
            bucket.gradients[sum(parameter.numel() for parameter in bucket.parameters) :].zero_()  # padding
            bucket.waits_for = num_microbatches * len(bucket.parameters)

    def finish(self) -> None:
        """Starts the sums over data parallel that backward passes did not start, and waits for all of them.

        A parameter that a micro-batch did not use has no gradient from it, so its bucket is reduced only here.
        """
        self._reduce(everything=True)
        for bucket in self.buckets:
            bucket.wait_for_gradients()

    def step(self, lr: float, largest_norm: torch.Tensor | float = math.inf) -> torch.Tensor:
        """Clips, steps and starts to gather the new weights; returns the norm before clipping, equal on every rank.

        If the norm is not finite, or above `largest_norm`, no weight and no moment is changed.
        """
        norm = self._norm()
        for group in self.adam.param_groups:
            group["lr"] = lr
        too_large = ((norm + 1e-6) / self._clip_grad).clamp(min=1.0) if self._clip_grad else None
        adam: Any = self.adam
        adam.found_inf = (~changes_weights(norm, largest_norm)).float()  # fused kernels do nothing where it is 1
        for bucket in reversed(self.buckets):  # about in the order in which the next forward pass uses them
            gradients = bucket.own_gradients
            if too_large is not None and gradients.dtype == torch.float32:
                adam.grad_scale = too_large.float()  # the kernel divides by it
            elif too_large is not None:
                gradients.div_(too_large)  # fp64, for which the kernel's divisor in fp32 is too coarse
            bucket.master.grad = gradients
            before = bucket.master.clone() if self.squares_of_update is not None else None
            adam.step()  # of this bucket alone: no other has a gradient
            if before is not None:
                self._measure(bucket, before)
            bucket.master.grad = None
            bucket.start_gathering()
        return norm

    def _measure(self, bucket: Bucket, before: torch.Tensor) -> None:
        """Adds to `squares_of_update` what changed in a bucket whose master weights were `before`."""
        assert self.squares_of_update is not None
        for first, end in bucket.counted:
            old = before[first:end]
            for i, part in enumerate((bucket.master[first:end] - old, old)):
                self.squares_of_update[i] += torch.linalg.vector_norm(part, dtype=torch.float64).square()

    def gather_weights(self) -> None:
        """Gives every rank the weights of all parts; collective. Called after master weights changed."""
        for bucket in self.buckets:
            bucket.start_gathering()
        self.wait_for_weights()

    def wait_for_weights(self) -> None:
        """Waits until the model's weights are those of the last update; called before anything reads or writes them."""
        for bucket in self.buckets:
            bucket.wait_for_weights()

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Returns the range of `parameter` that this rank owns; None if it owns nothing of it."""
        bucket, offset = _location(parameter)
        own = bucket.own
        first, end = max(own.start, offset), min(own.stop, offset + parameter.numel())
        return Fragment(first - offset, end - first, bucket.index, first - own.start) if end > first else None

    def _add(self, parameters: list[nn.Parameter], decayed: bool) -> None:
        """Makes a bucket of `parameters` and moves their elements into it."""
        mesh, first = self._mesh, parameters[0]
        group = mesh.expert_dp_group if is_expert(first) else mesh.zero_group
        unit = dist.get_world_size(group) * ALIGNMENT
        size = -(-sum(parameter.numel() for parameter in parameters) // unit) * unit
        wide = torch.promote_types(first.dtype, torch.float32)
        bucket = Bucket(
            index=len(self.buckets),
            parameters=parameters,
            group=group,
            decayed=decayed,
            weights=torch.zeros(size, dtype=first.dtype, device=first.device),
            gradients=torch.zeros(size, dtype=wide, device=first.device),
            master=torch.empty(0),
            counted=[],
        )
        offset = 0
        for parameter in parameters:
            view = bucket.weights.narrow(0, offset, parameter.numel()).view_as(parameter)
            parameter.data = view.copy_(parameter.detach())
            vars(parameter)["_location"] = bucket, offset
            parameter.register_post_accumulate_grad_hook(self._take)
            offset += parameter.numel()
        bucket.master = bucket.weights[bucket.own].to(wide)
        self.buckets.append(bucket)
        owned = [(p, self.fragment(p)) for p in parameters if counts_in_norm(p, mesh)]
        bucket.counted = _joined((own.offset, own.offset + own.numel) for _, own in owned if own is not None)

    def _take(self, parameter: torch.Tensor) -> None:
        """Accumulates a gradient that a backward pass has just made, and starts to reduce complete buckets."""
        bucket, _ = _location(parameter)
        kept, made = _gradient_in_bucket(parameter), parameter.grad
        assert made is not None
        parameter.grad = None
        if bucket.outdated.pop(id(parameter), None) is not None:
            kept.copy_(made)
        else:  # in parts, since adding bf16 to fp32 makes a copy in fp32
            for kept_part, made_part in in_parts(kept, made):
                kept_part.add_(made_part)
        bucket.waits_for -= 1
        assert bucket.waits_for >= 0, "a parameter got more gradients in a step than there are micro-batches"
        self._reduce()

    def _reduce(self, everything: bool = False) -> None:
        """Starts the sums of complete buckets, in the order of buckets, which is the same on every rank of a group."""
        while self._next_to_reduce < len(self.buckets):
            bucket = self.buckets[self._next_to_reduce]
            if bucket.waits_for and not everything:
                return
            self._next_to_reduce += 1
            bucket.start_reduction()

    def _norm(self) -> torch.Tensor:
        """Norm of the whole gradient in fp64, bit by bit the same on every rank."""
        squares = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        for bucket in self.buckets:
            for first, end in bucket.counted:
                squares += _sum_of_squares(bucket.own_gradients[first:end])
        # Gathered and added up in the order of ranks: the network's own sum may differ from rank to rank.
        everyone = [torch.empty_like(squares) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, squares)
        return torch.stack(everyone).sum().sqrt()


def _sum_of_squares(flat: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of all elements, in fp64; of fp32 numbers within 1e-7 of itself."""
    in_rows = len(flat) // NORM_ROW * NORM_ROW if flat.device.type == "cpu" else 0
    rows = torch.linalg.vector_norm(flat[:in_rows].view(-1, NORM_ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[in_rows:], dtype=torch.float64)
    return rows.double().square().sum() + rest.square()


def counts_in_norm(parameter: nn.Parameter, mesh: Mesh) -> bool:
    """Whether the gradient norm counts this rank's elements of `parameter`, which other ranks may hold as well."""
    is_copy = getattr(parameter, "ds_pipe_replicated", False)
    return not is_copy and mesh.is_first_copy(parameter)


def is_in_bucket(parameter: nn.Parameter) -> bool:
    """Returns whether a `DistributedOptimizer` updates `parameter`."""
    return hasattr(parameter, "_location")


def wait_for_weight(parameter: nn.Parameter) -> None:
    """Waits until the elements of `parameter` are those of the last update."""
    _location(parameter)[0].wait_for_weights()


def own_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Gradient of the elements of `parameter` that this rank owns, flat, a view; it may be empty."""
    return own_elements(parameter, gradient=True)[1]


def full(parameter: nn.Parameter, gradient: bool) -> torch.Tensor:
    """Gathers the gradient, or else the master weight, whole from all data-parallel ranks; collective over them."""
    bucket, _ = _location(parameter)
    first, own = own_elements(parameter, gradient)
    result = torch.zeros_like(parameter, dtype=bucket.gradients.dtype)
    result.view(-1)[first : first + len(own)] = own
    dist.all_reduce(result, group=bucket.group)
    return result


def own_elements(parameter: nn.Parameter, gradient: bool) -> tuple[int, torch.Tensor]:
    """Returns (first element of `parameter` that this rank owns, view of the gradient or weight from there on)."""
    bucket, offset = _location(parameter)
    own = bucket.own
    first = max(own.start, offset)
    numel = max(0, min(own.stop, offset + parameter.numel()) - first)
    part = bucket.own_gradients if gradient else bucket.master
    return first - offset, part.narrow(0, first - own.start if numel else 0, numel)


def _location(parameter: torch.Tensor) -> tuple[Bucket, int]:
    """Returns (bucket of `parameter`, offset of its first element in the bucket)."""
    return vars(parameter)["_location"]


def _gradient_in_bucket(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the view of its bucket that keeps the gradient of `parameter`."""
    bucket, offset = _location(parameter)
    return bucket.gradients.narrow(0, offset, parameter.numel()).view_as(parameter)


def _in_order_of_backward(stage: PipelineStage) -> list[tuple[list[nn.Parameter], bool]]:
    """Divides parameters into buckets; returns (parameters, whether their weights decay) of each.

    Backward finishes parameters about in the reverse of the order in which modules list them. An embedding or head has
    a bucket of its own: where both are one tied weight on two pipeline stages, the stages add up their parts of it. So
    has a weight that every stage holds.
    """
    done: list[tuple[list[nn.Parameter], bool]] = []
    filling: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    vocabulary = {id(parameter) for parameter in stage.vocabulary}
    for parameter in reversed([p for p in stage.parameters() if p.requires_grad]):
        kind = is_expert(parameter), marks_of(parameter).decays
        if id(parameter) in vocabulary:
            done.append(([parameter], True))
            continue
        if marks_of(parameter).on_every_stage:
            done.append(([parameter], kind[1]))
            continue
        bucket = filling.setdefault(kind, [])
        bucket.append(parameter)
        if sum(p.numel() for p in bucket) >= BUCKET_SIZE:
            done.append((filling.pop(kind), kind[1]))
    return done + [(bucket, decayed) for (_, decayed), bucket in filling.items()]


def _in_order_of_use(stage: PipelineStage) -> Iterator[tuple[nn.Module, Iterable[nn.Parameter]]]:
    """Yields modules whose forward passes follow one another, each with parameters that no module before it uses."""
    for chunk in stage.chunks:
        for module in chunk.input_modules:
            yield module, module.parameters()
        for block in chunk.blocks.values():
            yield block, block.parameters()
        if chunk.stage.is_last:  # the output head is used as a weight, its module is not called
            yield chunk.final_norm, chunk.parameters()


def _wait(buckets: list[Bucket], *_: Any) -> None:
    for bucket in buckets:
        bucket.wait_for_weights()


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins those of the given ranges, which are in order, that touch one another."""
    joined: list[tuple[int, int]] = []
    for first, end in ranges:
        if joined and joined[-1][1] == first:
            first = joined.pop()[0]
        joined.append((first, end))
    return joined
