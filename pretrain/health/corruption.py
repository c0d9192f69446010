"""Silent corruption: processors and memories that give wrong numbers without an error, found by computing twice.

At an interval two things are compared. Weights that several ranks hold must have the same bits on all of them; they are
looked at after the backward pass, before the update would spread what one rank has to the others. And one micro-batch
is computed twice from the same weights: every tensor of the forward pass and every gradient must have the same bits
both times. Where several are different, the first in the order of the computation is the cause, and names the rank.

A weight that only one rank holds, and that has changed in its memory, is not found.
"""

import platform
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from pretrain.health.not_finite import position
from pretrain.health.observing import OUTPUT_GRADIENT, WEIGHT_GRADIENT, TensorPosition, observed
from pretrain.model.batch import Batch
from pretrain.model.losses import LossFunction
from pretrain.parallel import zero
from pretrain.parallel.engine import Engine

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes
_NAMED = 3  # tensors that a message names
DigestKey = tuple[
    int, int, int, int, str
]  # phase, micro-batch, stage in the order of computation, number, path and kind


class SilentCorruption(RuntimeError):
    """Error for numbers that differ between ranks or between two computations; raised on all ranks together."""


class CorruptionCheck:
    """The checks of one run. All ranks call its methods together; they change no number of the training.

    `checked` is the number of steps that were done when all comparisons last came out right; 0 if none was made.
    """

    def __init__(self, engine: Engine, repeatable: bool):
        """Makes the checks; where numbers are not `repeatable` from call to call, nothing is computed twice."""
        self._engine, self._mesh, self._repeatable = engine, engine.mesh, repeatable
        self._me = f"{position(engine.mesh)} on {platform.node()}"
        self.checked = 0

    def compute_twice(self, step: int, batches: Sequence[Batch], loss_fn: LossFunction) -> None:
        """Computes the first of a step's micro-batches twice. Raises SilentCorruption if the results differ."""
        if not self._repeatable:
            return
        layout = self._mesh.layout
        few = batches[: layout.pp if layout.vpp > 1 else 1]  # an interleaved schedule takes them by groups of pp
        first, second = self._digests(few, loss_fn), self._digests(few, loss_fn)
        different = sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))
        own = [list(different[0]), self._me] if different else None
        found = [one for one in self._mesh.gather_json(own) if one]
        if not found:
            return
        key, rank = min(found, key=lambda one: one[0])
        self._fail(
            step,
            f"micro-batch {key[1] + 1} was computed twice and had other bits the second time, first {key[4]} on {rank}",
            "its processor or memory is at fault",
        )

    def compare_weights(self, step: int) -> None:
        """Compares the weights that several ranks hold. Raises SilentCorruption if their bits differ."""
        engine, slices = self._engine, self._mesh.slices
        zero.wait_for_weights(engine.zero)
        named = list(engine.module.named_global_parameters())
        sums = torch.stack([_digest(slices.without_padding(p.detach(), p)) for _, p in named]).tolist()
        own = {f"{name} from {list(slices.offset(p))}": total for (name, p), total in zip(named, sums, strict=True)}
        ranks = self._mesh.gather_json([self._me, own])
        holders: dict[str, dict[int, int]] = defaultdict(dict)  # by weight: digest by rank
        for rank, (_, digests) in enumerate(ranks):
            for name, digest in digests.items():
                holders[name][rank] = digest
        wrong: dict[tuple[int, ...], list[str]] = defaultdict(list)  # by ranks that differ from most: the weights
        for name, digests in holders.items():
            if len(set(digests.values())) > 1:
                wrong[outvoted(digests)].append(name)
        if not wrong:
            self.checked = step
            return
        told = []
        for odd, names in wrong.items():
            shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more weights" if names[_NAMED:] else "")
            who = " and ".join(ranks[rank][0] for rank in odd)
            others = len(holders[names[0]]) - len(odd)
            if others:
                told.append(f"{who} has other bits of {shown} than the {others} other ranks that hold the same")
            else:
                told.append(f"{who} have different bits of {shown}, of which they should hold the same")
        known = all(len(holders[names[0]]) > len(odd) for odd, names in wrong.items())
        at_fault = "its processor or memory is at fault" if known else "one of them is at fault, and none is outvoted"
        self._fail(step, "; ".join(told), at_fault)

    def _fail(self, step: int, what: str, at_fault: str) -> None:
        since = f"step {self.checked}" if self.checked else "this start of the run"
        raise SilentCorruption(
            f"silent corruption before the update of step {step + 1}: {what}; {at_fault}. Leave this machine out, and "
            f"go on from a checkpoint of {since} or before: later ones may have wrong numbers, though none were found"
        )

    def _digests(self, batches: Sequence[Batch], loss_fn: LossFunction) -> dict[DigestKey, int]:
        """Computes micro-batches, and returns a digest of each tensor by its position."""
        keys: list[DigestKey] = []
        sums: list[torch.Tensor] = []

        def see(kind: str, position: TensorPosition, tensor: torch.Tensor) -> None:
            backward = kind in (OUTPUT_GRADIENT, WEIGHT_GRADIENT)
            stage = -position.stage if backward else position.stage
            what = f"the {kind} of {position.module}" if position.module else "the loss"
            keys.append((int(backward), position.micro_batch, stage, position.order, what))
            sums.append(_digest(tensor))

        with observed(self._engine, see):
            self._engine.accumulate(batches, loss_fn)
        return dict(zip(keys, torch.stack(sums).tolist(), strict=True))


def outvoted(digests: dict[int, int]) -> tuple[int, ...]:
    """Returns the ranks whose digest is not that of the majority; all ranks if no digest has a majority."""
    (digest, count), *_ = Counter(digests.values()).most_common(1)
    if 2 * count <= len(digests):
        return tuple(sorted(digests))
    return tuple(sorted(rank for rank, own in digests.items() if own != digest))


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum of a tensor's elements, read as integers: any single changed bit changes it."""
    bits: Any = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)
