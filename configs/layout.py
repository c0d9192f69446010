"""Checks that the degrees of parallelism fit the model, the batch and the world size, and suggests values that do.

World size = dp * pp * cp * tp; experts are spread over ep of the dp * cp ranks that otherwise hold the same weights.
Rank order is megatron-core's "tp-cp-ep-dp-pp": tensor-parallel ranks are neighbours, pipeline stages are farthest
apart. Imports no torch, so that it also runs on a login node.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.model_size import mean_layer_parameters, mtp_parameters
from configs.remedies import SEVERAL_KEYS, Misfit, divisors, multiples, remedies
from configs.train import ParallelConfig, TrainSection

RANKS = "the number of ranks"
GROUP_SIZE = "grpo.group_size"
SEQ_LENGTH = "train.seq_length"
CAPACITY_FACTOR = "model.moe.capacity_factor"


@dataclass(frozen=True)
class LayoutRequest:
    """The numbers that a layout must fit: world size, and the sections [parallel], [model] and [train].

    A data-parallel rank holds whole groups of `group_size` samples. Messages suggest no change to the keys in `given`,
    whose values are fixed, for example by a data plan or a checkpoint.
    """

    world_size: int
    parallel: ParallelConfig
    model: ModelConfig
    train: TrainSection
    group_size: int = 1
    given: frozenset[str] = frozenset()

    def value(self, key: str) -> Any:
        """Value of `key`, a dotted config key or `RANKS`."""
        match key.split("."):
            case ["parallel", name]:
                return getattr(self.parallel, name)
            case ["train", name]:
                return getattr(self.train, name)
        assert key in (RANKS, GROUP_SIZE, CAPACITY_FACTOR), key
        moe = self.model.moe
        return {RANKS: self.world_size, GROUP_SIZE: self.group_size}.get(key, moe and moe.capacity_factor)

    def changed(self, key: str, value: Any) -> "LayoutRequest":
        """Returns a copy with one key changed."""
        match key.split("."):
            case ["parallel", name]:
                return replace(self, parallel=self.parallel.model_copy(update={name: value}))
            case ["train", name]:
                return replace(self, train=self.train.model_copy(update={name: value}))
        if key == CAPACITY_FACTOR:
            assert self.model.moe is not None
            moe = self.model.moe.model_copy(update={"capacity_factor": value})
            return replace(self, model=self.model.model_copy(update={"moe": moe}))
        return replace(self, **{{RANKS: "world_size", GROUP_SIZE: "group_size"}[key]: value})

    def fits(self, key: str, value: Any) -> bool:
        """Returns whether the layout would be legal with one key changed."""
        try:
            Layout.fit(self.changed(key, value))
        except Misfit:
            return False
        return True


class _LayoutMisfit(Misfit):
    """A reason why no layout fits; `keys` has the values to try for each key, None for the divisors of the ranks."""

    def __init__(self, request: LayoutRequest, problem: str, **keys: Sequence[Any] | None) -> None:
        found = {_KEYS[name]: values for name, values in keys.items() if _KEYS[name] not in request.given}
        ranks = divisors(request.world_size)
        super().__init__(problem, {key: ranks if values is None else values for key, values in found.items()})


_KEYS = {
    **{name: f"parallel.{name}" for name in ParallelConfig.model_fields},
    "global_batch_size": "train.global_batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "seq_length": SEQ_LENGTH,
    "capacity_factor": CAPACITY_FACTOR,
    "group_size": GROUP_SIZE,
    "ranks": RANKS,
}


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism that fit the model, the batch and the world size.

    `grad_accum_steps` is the number of micro-batches of each data-parallel rank in a step. `layers_per_stage` counts
    the layers of every virtual pipeline stage; virtual stage v is chunk v // pp of pipeline rank v % pp. `kv_copies` is
    the number of tensor-parallel ranks that hold the same key-value head.
    """

    world_size: int
    tp: int
    sp: bool
    cp: int
    ep: int
    pp: int
    vpp: int
    dp: int
    zero: int
    offload_optimizer: bool
    grad_accum_steps: int
    layers_per_stage: tuple[int, ...]
    kv_copies: int = 1

    @classmethod
    def of(
        cls,
        world_size: int,
        parallel: ParallelConfig,
        model: ModelConfig,
        train: TrainSection,
        group_size: int = 1,
        given: Sequence[str] = (),
    ) -> "Layout":
        """Returns the layout for these numbers, which `LayoutRequest` explains.

        Raises ConfigError if they do not fit together; it names them, and the nearest values that do fit.
        """
        request = LayoutRequest(world_size, parallel, model, train, group_size, frozenset(given))
        try:
            return cls.fit(request)
        except Misfit as misfit:
            from configs.nearest_layout import legal_together  # which uses this module

            said = remedies(misfit, request.value, request.fits)
            together = legal_together(request) if said.endswith(SEVERAL_KEYS) else ""
            raise ConfigError(f"{misfit}; {said}{together}") from None

    @classmethod
    def fit(cls, request: LayoutRequest) -> "Layout":
        """Returns the layout for `request`. Raises Misfit if its numbers do not fit together."""
        parallel, world_size = request.parallel, request.world_size
        tp, cp, pp = parallel.tp, parallel.cp, parallel.pp
        replica = tp * cp * pp
        if world_size % replica:
            raise _LayoutMisfit(
                request,
                f"parallel.tp * parallel.cp * parallel.pp = {tp} * {cp} * {pp} = {replica} does not divide the "
                f"{world_size} ranks started",
                ranks=multiples(replica, world_size),
                tp=None,
                cp=None,
                pp=None,
            )
        _check_zero(request)
        _check_tensor_parallel(request)
        _check_sequence(request)
        layers_per_stage = _split_layers(request)
        dp = world_size // replica
        _check_experts(request, dp)
        accum = _split_batch(request, dp)
        zero, offload = parallel.zero, parallel.offload_optimizer
        degrees = world_size, tp, parallel.sp, cp, parallel.ep, pp, parallel.vpp, dp
        kv_copies = max(1, tp // request.model.num_kv_heads)
        return cls(*degrees, zero, offload, accum, layers_per_stage, kv_copies)

    def __str__(self) -> str:
        """Short form for logs, such as `tp2 sp pp2 dp4 zero1`."""
        sp, vpp = " sp" if self.sp else "", f" vpp{self.vpp}" if self.vpp > 1 else ""
        cp, ep = f" cp{self.cp}" if self.cp > 1 else "", f" ep{self.ep}" if self.ep > 1 else ""
        offload = " offload" if self.offload_optimizer else ""
        return f"tp{self.tp}{sp}{cp} pp{self.pp}{vpp} dp{self.dp}{ep} zero{self.zero}{offload}"

    def layers_of_stage(self, stage: int) -> range:
        """Global indices of the layers of virtual pipeline stage `stage`."""
        first = sum(self.layers_per_stage[:stage])
        return range(first, first + self.layers_per_stage[stage])


def _check_tensor_parallel(request: LayoutRequest) -> None:
    parallel, model = request.parallel, request.model
    tp = parallel.tp
    sizes = {"model.num_heads": model.num_heads}
    if any(layer.moe is None or not layer.moe.ffn_hidden_size for layer in model.layers):
        sizes["model.ffn_hidden_size"] = model.ffn_hidden_size
    if model.moe and model.moe.ffn_hidden_size:
        sizes["model.moe.ffn_hidden_size"] = model.moe.ffn_hidden_size
    if model.moe and model.moe.shared_ffn_hidden_size:
        sizes["model.moe.shared_ffn_hidden_size"] = model.moe.shared_ffn_hidden_size
    for name, size in sizes.items():
        if size % tp:
            raise _LayoutMisfit(request, f"{name} = {size} is not a multiple of parallel.tp = {tp}", tp=None)
    kv_heads = model.num_kv_heads
    if kv_heads % tp and tp % kv_heads:
        raise _LayoutMisfit(
            request,
            f"model.num_kv_heads = {kv_heads} is neither a multiple nor a divisor of parallel.tp = {tp}, whose ranks "
            "each hold whole key-value heads, or several of them the same one",
            tp=None,
        )
    _check_delta_heads(request)
    if parallel.sp and tp == 1:
        raise _LayoutMisfit(
            request,
            "parallel.sp = true splits the sequence over the ranks of parallel.tp, and tp = 1 is a single rank",
            sp=(False,),
            tp=None,
        )


def _check_delta_heads(request: LayoutRequest) -> None:
    """Checks tp and cp, each of whose ranks has whole key heads of gated delta nets and the value heads they serve."""
    tp, cp, delta = request.parallel.tp, request.parallel.cp, request.model.attention.delta
    if delta and delta.num_key_heads % (tp * cp):
        raise _LayoutMisfit(
            request,
            f"model.attention.delta.num_key_heads = {delta.num_key_heads} is not a multiple of parallel.tp * "
            f"parallel.cp = {tp} * {cp}, over which gated delta nets split their heads",
            cp=None,
            tp=None,
        )


def _check_sequence(request: LayoutRequest) -> None:
    """Checks cp and sp, which split the sequence everywhere but in attention; there cp splits the heads instead."""
    parallel, model, train = request.parallel, request.model, request.train
    tp, cp, parts = parallel.tp, parallel.cp, parallel.sequence_parts
    longest = model.position.max_positions
    if longest is not None and train.seq_length > longest:
        raise _LayoutMisfit(
            request,
            f"train.seq_length = {train.seq_length} is more than model.position.max_positions = {longest}, and later "
            "positions have no vector",
            seq_length=[n for n in multiples(parts, longest) if n <= longest][-1:],
        )
    if train.seq_length % parts:
        factors = [f"parallel.cp = {cp}"] * (cp > 1) + [f"parallel.tp = {tp} (parallel.sp = true)"] * parallel.sp
        raise _LayoutMisfit(
            request,
            f"train.seq_length = {train.seq_length} is not a multiple of {' * '.join(factors)}",
            seq_length=[n for n in multiples(parts, train.seq_length) if n > train.seq_length],
            cp=None,
        )
    if cp == 1:
        return
    if model.num_heads % (tp * cp):
        raise _LayoutMisfit(
            request,
            f"model.num_heads = {model.num_heads} is not a multiple of parallel.tp * parallel.cp = {tp} * {cp}, over "
            "which attention splits its heads",
            cp=None,
            tp=None,
        )
    if model.moe and model.moe.capacity_factor is not None:
        raise _LayoutMisfit(
            request,
            f"model.moe.capacity_factor = {model.moe.capacity_factor} counts an expert's tokens over whole sequences, "
            f"and parallel.cp = {cp} splits them",
            capacity_factor=(None,),
            cp=(1,),
        )


def _check_experts(request: LayoutRequest, dp: int) -> None:
    parallel, model = request.parallel, request.model
    ep, ranks = parallel.ep, dp * parallel.cp
    if ep == 1:
        return
    if model.moe is None:
        raise _LayoutMisfit(request, f"parallel.ep = {ep} spreads experts, but the model has none", ep=(1,))
    if model.moe.num_experts % ep:
        raise _LayoutMisfit(
            request,
            f"model.moe.num_experts = {model.moe.num_experts} is not a multiple of parallel.ep = {ep}",
            ep=None,
        )
    if ranks % ep:
        raise _LayoutMisfit(
            request,
            f"parallel.ep = {ep} does not divide dp * cp = {dp} * {parallel.cp} = {ranks}, the ranks that experts are "
            "spread over",
            ep=None,
            ranks=multiples(parallel.tp * parallel.pp * ep, dp * parallel.cp * parallel.tp * parallel.pp),
        )


def _check_zero(request: LayoutRequest) -> None:
    zero, pp, ep = request.parallel.zero, request.parallel.pp, request.parallel.ep
    if zero > 1 and pp > 1:
        raise _LayoutMisfit(
            request,
            f"parallel.zero = {zero} with parallel.pp = {pp}: ZeRO stages 2 and 3 scatter gradients after every "
            "micro-batch, and a pipeline accumulates them over all micro-batches",
            zero=(1, 2),
            pp=(1,),
        )
    if zero == 3 and ep > 1:
        raise _LayoutMisfit(
            request,
            f"parallel.zero = 3 with parallel.ep = {ep}: ZeRO stage 3 would split each expert over all data-parallel "
            "ranks, also those that hold other experts",
            zero=(1, 2),
            ep=(1,),
        )


def _split_layers(request: LayoutRequest) -> tuple[int, ...]:
    parallel, model = request.parallel, request.model
    pp, vpp, layers = parallel.pp, parallel.vpp, model.num_layers
    stages = pp * vpp
    if vpp > 1 and pp == 1:
        raise _LayoutMisfit(
            request,
            f"parallel.vpp = {vpp} interleaves the stages of a pipeline, and parallel.pp = 1 is no pipeline",
            vpp=(1,),
            pp=None,
        )
    if stages > layers:
        raise _LayoutMisfit(
            request,
            f"parallel.pp * parallel.vpp = {pp} * {vpp} = {stages} stages are more than model.num_layers = {layers}; "
            "every stage needs at least one layer",
            pp=None,
            vpp=range(1, vpp),
        )
    given = parallel.layers_per_stage
    if given is None:
        heads = (1 + model.head.mtp_depth) * model.head_size * model.hidden_size + mtp_parameters(model, active=True)
        head = heads / mean_layer_parameters(model, active=True)
        return balanced_layers(layers, stages, head)
    if len(given) != stages or sum(given) != layers or min(given) < 1:
        raise _LayoutMisfit(
            request,
            f"parallel.layers_per_stage = {list(given)} are {len(given)} numbers with sum {sum(given)}; they must be "
            f"pp * vpp = {stages} numbers of 1 or more with sum model.num_layers = {layers}",
            layers_per_stage=(None,),
        )
    return given


def _split_batch(request: LayoutRequest, dp: int) -> int:
    """Checks the batch sizes and returns the number of micro-batches of each data-parallel rank in a step."""
    pp, vpp, group = request.parallel.pp, request.parallel.vpp, request.group_size
    micro, batch = request.train.micro_batch_size, request.train.global_batch_size
    whole = dp * math.lcm(micro * (pp if vpp > 1 else 1), group)
    sizes = {"global_batch_size": multiples(whole, batch), "micro_batch_size": divisors(batch // dp)}
    if batch % (dp * micro):
        raise _LayoutMisfit(
            request,
            f"train.global_batch_size = {batch} is not a multiple of dp * train.micro_batch_size = {dp} * {micro}",
            **sizes,
        )
    if batch % (dp * group):
        raise _LayoutMisfit(
            request,
            f"train.global_batch_size = {batch} over {dp} data-parallel ranks is {batch // dp} samples each, not a "
            f"multiple of {GROUP_SIZE} = {group}, and a group cannot be split over ranks",
            global_batch_size=sizes["global_batch_size"],
            group_size=divisors(batch // dp, least=2),
        )
    accum = batch // (dp * micro)
    if vpp > 1 and accum % pp:
        raise _LayoutMisfit(
            request,
            f"parallel.vpp = {vpp} interleaves micro-batches in groups of parallel.pp = {pp}, and a step has "
            f"{accum} on each data-parallel rank",
            **sizes,
            vpp=(1,),
        )
    return accum


def balanced_layers(layers: int, stages: int, head: float) -> tuple[int, ...]:
    """Returns the number of layers of each stage that makes the slowest stage fastest.

    The last stage also has the output head, whose cost is that of `head` layers. The embedding lookup of the first
    stage costs next to nothing. Layers that do not divide evenly go to later stages, since earlier stages keep the
    activations of more micro-batches (1F1B).
    """
    if stages == 1:
        return (layers,)

    def slowest(last: int) -> tuple[float, int]:
        others = -(-(layers - last) // (stages - 1))
        return max(others, last + head), -last  # of equals, the most even: most layers beside the head

    last = min(range(1, layers - stages + 2), key=slowest)
    share, left = divmod(layers - last, stages - 1)
    return *(share + (i >= stages - 1 - left) for i in range(stages - 1)), last
