"""The part of a job that a rehearsal runs: ranks and micro-batches that stand for all others. Imports no torch."""

import math
from dataclasses import dataclass

from configs.layout import Layout
from configs.train import ParallelConfig


@dataclass(frozen=True, order=True)
class RankCoordinates:
    """The coordinates of a rank. `data` counts the dp * cp ranks that have the same weights, experts aside."""

    stage: int
    data: int
    tensor: int

    def rank(self, layout: Layout) -> int:
        """Returns the rank with these coordinates, in the order that `configs.layout` describes."""
        return (self.stage * layout.dp * layout.cp + self.data) * layout.tp + self.tensor


def coordinates_of(rank: int, layout: Layout) -> RankCoordinates:
    """Returns the coordinates of `rank`."""
    rest, tensor = divmod(rank, layout.tp)
    stage, data = divmod(rest, layout.dp * layout.cp)
    return RankCoordinates(stage, data, tensor)


def smallest_world(parallel: ParallelConfig) -> int:
    """Returns the number of ranks of the smallest world that has these degrees of parallelism."""
    return parallel.tp * parallel.pp * math.lcm(parallel.cp, parallel.ep)


def distinct_micro_batches(layout: Layout) -> int:
    """Returns how many micro-batches of a step have every part of the pipeline's schedule: start, middle and end.

    A stage begins with as many forward passes as stages follow it, then takes forward and backward in turn. An
    interleaved schedule goes by groups of pp micro-batches, and two of them are more than its start. ZeRO stages 2 and
    3 learn from the first two micro-batches which weights come next, and may treat the last one in their own way.
    """
    enough = 2 * layout.pp if layout.vpp > 1 else layout.pp + 1
    return min(layout.grad_accum_steps, 4 if layout.zero > 1 else enough)


def distinct_ranks(layout: Layout) -> list[int]:
    """Returns ranks that stand for all others, which differ from one of them in nothing but their group's members.

    They are those of every pipeline stage, and on each of them the first and the last rank of every group: of tensor
    parallel, of context parallel, of expert parallel, and of the data-parallel groups of weights and of experts. Where
    several tensor-parallel ranks hold the same key-value head, the second one is among them, too.
    """
    cp, ep, last = layout.cp, layout.ep, layout.dp * layout.cp - 1
    data = sorted({0, cp - 1, ep - 1, last + 1 - cp, last + 1 - ep, last})
    tensor = sorted({0, min(1, layout.tp - 1) if layout.kv_copies > 1 else 0, layout.tp - 1})
    corners = {(d, 0) for d in data} | {(0, t) for t in tensor} | {(last, layout.tp - 1)}
    return sorted(RankCoordinates(stage, d, t).rank(layout) for stage in range(layout.pp) for d, t in corners)
