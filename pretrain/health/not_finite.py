"""The first tensor of a step that is not finite, found by taking the step's forward and backward passes again.

The order is that of cause and effect: weights first, then what the forward passes compute, in the order of pipeline
stages and modules, then the gradients in the order of the backward passes. A rank that feeds others its numbers is
found before those that got them, since the tensors of all ranks are compared by their positions in the step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pretrain.health.observing import INPUT, OUTPUT, OUTPUT_GRADIENT, WEIGHT_GRADIENT, TensorPosition, observed
from pretrain.model.batch import Batch
from pretrain.model.losses import LossFunction
from pretrain.parallel import zero
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh

WEIGHT = "weight"
LARGEST = 1e15  # a gradient beyond it may have a norm beyond fp32: 1e7 such elements have squares of 1e37
_PHASES = {WEIGHT: 0, INPUT: 1, OUTPUT: 1, OUTPUT_GRADIENT: 2, WEIGHT_GRADIENT: 2}
NOTHING = (
    "computed again, all of the step's tensors are finite: a processor or its memory gave a wrong number once; look at "
    "the machines, and run the command again"
)

TOO_LARGE = (
    "computed again, all of the step's tensors are finite, but the norm of gradients of up to {:.0e} is not: a factor "
    "of the loss is too large, or the run diverges"
)

Describe = Callable[[int, int | None], str]  # sample and position in its row, if it is known, to words


@dataclass(frozen=True)
class Found:
    """The first tensor on a rank that is not finite."""

    kind: str
    position: TensorPosition
    shape: tuple[int, ...]
    count: int  # of its elements that are not finite
    index: tuple[int, ...]  # of the first of them

    @property
    def key(self) -> tuple[int, ...]:
        """Sort key in the order of cause and effect: of all tensors found, the lowest is the cause."""
        phase, stage = _PHASES[self.kind], self.position.stage
        return phase, self.position.micro_batch, -stage if phase == 2 else stage, self.position.order


class Finder:
    """Looks at tensors, and keeps the first that is not finite, and the largest size of a weight's gradient."""

    def __init__(self) -> None:
        self.found: Found | None = None
        self.largest = 0.0

    def see(self, kind: str, position: TensorPosition, tensor: torch.Tensor) -> None:
        wrong = ~tensor.detach().isfinite()
        if not bool(wrong.any()):
            if kind == WEIGHT_GRADIENT and tensor.numel():
                self.largest = max(self.largest, float(tensor.detach().abs().max()))
            return
        index = tuple(int(i) for i in wrong.nonzero()[0])
        found = Found(kind, position, tuple(tensor.shape), int(wrong.sum()), index)
        if self.found is None or found.key < self.found.key:
            self.found = found


def first_not_finite(engine: Engine, batches: Sequence[Batch], loss_fn: LossFunction, describe: Describe) -> str:
    """Says which tensor of the step on these micro-batches is the first that is not finite, on which rank. Collective.

    `batches` are the rank's own, as `Engine.train_step` takes them, and the weights those that the step began with. No
    weight changes. ZeRO stages 2 and 3 and offloading are left out: there it returns "".
    """
    if engine.mesh.layout.zero > 1 or engine.mesh.layout.offload_optimizer:
        return ""
    zero.wait_for_weights(engine.zero)
    finder = Finder()
    for order, (name, parameter) in enumerate(engine.module.named_global_parameters()):
        finder.see(WEIGHT, TensorPosition(0, engine.mesh.pp_rank, order, name), parameter)
    with observed(engine, finder.see):
        engine.accumulate(batches, loss_fn)
    own: dict[str, Any] = {"largest": finder.largest}
    if finder.found is not None:
        own |= {"key": finder.found.key, "said": _said(finder.found, engine.mesh, batches, describe)}
    of_ranks = engine.mesh.gather_json(own)
    everyone = [(one["key"], rank, one["said"]) for rank, one in enumerate(of_ranks) if "key" in one]
    if not everyone:
        largest = max(one["largest"] for one in of_ranks)
        return TOO_LARGE.format(largest) if largest > LARGEST else NOTHING
    key, rank, said = min(everyone)
    also = [other for found, other, _ in everyone if found == key and other != rank]
    return said + (f"; the same on rank{'s' if also[1:] else ''} {', '.join(map(str, also))}" if also else "")


def _said(found: Found, mesh: Mesh, batches: Sequence[Batch], describe: Describe) -> str:
    name = f"the {found.kind} of {found.position.module}" if found.position.module else "the loss"
    if found.kind in (WEIGHT, WEIGHT_GRADIENT):
        name = f"the {'weight' if found.kind == WEIGHT else 'gradient of the weight'} {found.position.module}"
    number, where, after = found.position.micro_batch, position(mesh), ""
    if found.kind != WEIGHT:
        where += f", micro-batch {number + 1} of {len(batches)}"
        after = _sample(found, mesh, batches[min(number, len(batches) - 1)], describe)
    count = f"{found.count:,} of {torch.Size(found.shape).numel():,} values of {list(found.shape)}"
    return f"the first tensor that is not finite is {name} on {where}: {count}, the first at {list(found.index)}{after}"


def _sample(found: Found, mesh: Mesh, batch: Batch, describe: Describe) -> str:
    """Names the sample that the first wrong element belongs to, or those of its micro-batch if the shape tells less."""
    if batch.samples is None:
        return ""
    shape, (rows, length) = found.shape, batch.tokens.shape
    if found.kind != WEIGHT_GRADIENT and len(shape) == 3 and shape[1] == rows and length % shape[0] == 0:
        parts = length // shape[0]  # the sequence is split over ranks
        part = mesh.sequence_part[0] if parts == mesh.sequence_part[1] else mesh.cp_rank if parts > 1 else 0
        position_in_row = part * shape[0] + found.index[0]
        return f", token {position_in_row} of {describe(batch.samples[found.index[1]], position_in_row)}"
    named = [describe(sample, None) for sample in batch.samples]
    return f", of {'; '.join(named)}"


def position(mesh: Mesh) -> str:
    """Names a rank with its coordinates, for example `rank 3 (dp 0, pp 1, tp 1)`."""
    layout = mesh.layout
    coordinates = {
        "dp": (mesh.dp_rank, layout.dp),
        "pp": (mesh.pp_rank, layout.pp),
        "cp": (mesh.cp_rank, layout.cp),
        "ep": (mesh.ep_rank, layout.ep),
        "tp": (mesh.tp_rank, layout.tp),
    }
    told = ", ".join(f"{name} {own}" for name, (own, degree) in coordinates.items() if degree > 1)
    return f"rank {mesh.rank}" + (f" ({told})" if told else "")
