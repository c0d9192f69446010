"""The legal layout nearest to that of a config, for fewer ranks than it was written for, at the same global batch.

If the config's degrees fit with fewer data-parallel ranks, only those become fewer: each rank then holds what it held,
but for its share of the optimizer's state. Else the layout that splits the model the most is taken, since it needs the
least memory, of these the one with the most ranks, and of these the one most like the config's. Tensor and context
parallel, whose ranks exchange the most, never grow. Memory is not predicted here; see `trivium rehearse`.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from configs.layout import SEQ_LENGTH, Layout, LayoutRequest
from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.remedies import Misfit, divisors
from configs.train import ParallelConfig, TrainSection

TOGETHER = 100  # layouts that are tried for a message


@dataclass(frozen=True)
class NearestLayout:
    """A legal layout of at most `ranks` ranks, and the values of the config's keys that lead to it.

    `changed` has the keys whose values are not the config's.
    """

    ranks: int
    layout: Layout
    micro_batch_size: int
    changed: dict[str, Any]

    @property
    def idle(self) -> int:
        """The number of ranks that no legal layout, or none as near, has work for."""
        return self.ranks - self.layout.world_size

    @property
    def overrides(self) -> list[str]:
        """The changed keys as overrides of a command line."""
        words = {True: "true", False: "false", None: "none"}
        return [
            f"{key}={words[value] if isinstance(value, bool | None) else value}" for key, value in self.changed.items()
        ]


def nearest_layout(ranks: int, parallel: ParallelConfig, model: ModelConfig, train: TrainSection) -> NearestLayout:
    """Returns the nearest legal layout for `ranks` ranks, see the module's docstring.

    Raises ConfigError, as `Layout.of` does for that many ranks, if none is legal.
    """
    request = LayoutRequest(ranks, parallel, model, train)
    found = _fewer_data_parallel(request) or _other_degrees(request)
    if found is None:
        Layout.of(ranks, parallel, model, train, given=(SEQ_LENGTH,))  # which says what does not fit
        raise ConfigError(f"no layout of {ranks} ranks or fewer fits the model and train.global_batch_size")
    return found


def legal_together(request: LayoutRequest) -> str:
    """Returns overrides that together make an illegal layout of as many ranks legal, as the end of a sentence, or "".

    Of a hundred layouts with other degrees, in which the fewest keys differ, the first legal one is taken. Keys that
    are given stay as they are.
    """
    given, ranks, layers = request.parallel, request.world_size, request.model.num_layers
    experts = request.model.moe.num_experts if request.model.moe else 1
    degrees = [
        {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "ep": ep, "sp": given.sp and tp > 1}
        for tp, cp in itertools.product(divisors(given.tp), divisors(given.cp))
        if ranks % (tp * cp) == 0
        for pp in divisors(ranks // (tp * cp))
        if pp <= layers
        for vpp in ({1, given.vpp} if pp > 1 else {1})
        for ep in divisors(experts)
        if ep <= given.ep
    ]

    def change(one: dict[str, int]) -> tuple[int, float]:
        """Returns a sort key: how many degrees differ, and by how much those that split the model do in all."""
        ratios = (abs(math.log(one[name] / getattr(given, name))) for name in ("tp", "cp", "pp", "ep"))
        return sum(value != getattr(given, name) for name, value in one.items()), sum(ratios)

    for one in sorted(degrees, key=change)[:TOGETHER]:
        stages = given.layers_per_stage if one["pp"] * one["vpp"] == given.pp * given.vpp else None
        parallel = given.model_copy(update={**one, "layers_per_stage": stages})
        found = _with_batch(request, replace(request, parallel=parallel))
        if found and not request.given.intersection(found.changed):
            return f", such as {' '.join(found.overrides)}"
    return ""


def _fewer_data_parallel(request: LayoutRequest) -> NearestLayout | None:
    """Returns the layout with the config's own degrees and the most data-parallel ranks that are legal."""
    parallel = request.parallel
    replica = parallel.tp * parallel.cp * parallel.pp
    for dp in _data_parallel(request, replica):
        if found := _with_batch(request, replace(request, world_size=dp * replica)):
            return found
    return None


def _data_parallel(request: LayoutRequest, replica: int) -> list[int]:
    """Returns the numbers of data-parallel ranks, the most first, that could share the global batch."""
    most, batch = request.world_size // replica, request.train.global_batch_size
    return [dp for dp in range(min(most, batch), 0, -1) if batch % dp == 0]


def _other_degrees(request: LayoutRequest) -> NearestLayout | None:
    """Returns the nearest legal layout with other degrees; None if there is none."""
    found: list[NearestLayout] = []
    for parallel in sorted(_degrees(request), key=_parts, reverse=True):
        if found and _parts(parallel) < _parts(found[0].layout):
            break
        replica = parallel.tp * parallel.cp * parallel.pp
        for dp in _data_parallel(request, replica):
            if dp * parallel.cp % parallel.ep == 0 and (
                one := _with_batch(request, replace(request, world_size=dp * replica, parallel=parallel))
            ):
                found.append(one)
                break
    return max(found, key=lambda one: _nearness(request.parallel, one), default=None)


def _degrees(request: LayoutRequest) -> Iterator[ParallelConfig]:
    """Yields sections [parallel] with other degrees, of which some fit and some do not."""
    given, ranks = request.parallel, request.world_size
    experts = request.model.moe.num_experts if request.model.moe else 1
    for tp, cp in itertools.product(divisors(given.tp), divisors(given.cp)):
        for pp in range(1, min(request.model.num_layers, ranks // (tp * cp)) + 1):
            for vpp in range(1, given.vpp + 1) if pp > 1 else [1]:
                stages = given.layers_per_stage if pp * vpp == given.pp * given.vpp else None
                for ep in (one for one in divisors(experts) if one <= given.ep):
                    degrees = {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "ep": ep, "sp": given.sp and tp > 1}
                    yield given.model_copy(update={**degrees, "layers_per_stage": stages})


def _parts(degrees: ParallelConfig | Layout) -> int:
    """Returns the number of parts into which degrees split the model, or its experts, and a sequence."""
    return degrees.tp * degrees.cp * degrees.pp * degrees.ep


def _nearness(given: ParallelConfig, one: NearestLayout) -> tuple[Any, ...]:
    """Returns a sort key for legal layouts with other degrees; the greatest is the nearest."""
    layout = one.layout
    return (
        _parts(layout),
        layout.world_size,
        layout.tp == given.tp,
        layout.pp == given.pp,
        layout.cp == given.cp,
        layout.tp,
        one.micro_batch_size,
        layout.vpp,
    )


def _with_batch(request: LayoutRequest, changed: LayoutRequest) -> NearestLayout | None:
    """Returns the layout of `changed` with the largest legal micro-batch up to the config's; None if there is none."""
    train = request.train
    for size in range(train.micro_batch_size, 0, -1):
        try:
            layout = Layout.fit(changed.changed("train.micro_batch_size", size))
        except Misfit:
            continue
        before, after = request.parallel, changed.parallel
        keys = {
            f"parallel.{name}": getattr(after, name)
            for name in ParallelConfig.model_fields
            if getattr(after, name) != getattr(before, name)
        }
        keys |= {"train.micro_batch_size": size} if size != train.micro_batch_size else {}
        return NearestLayout(request.world_size, layout, size, keys)
    return None
