"""All degrees of parallelism against model, batch and world size, in one place. No torch, so a login node can ask.

World size = dp * pp * cp * tp; experts are spread over ep of the dp * cp ranks that otherwise hold the same weights.
Rank order is megatron-core's "tp-cp-ep-dp-pp": tensor-parallel ranks are neighbours, pipeline stages are farthest
apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.loader import ConfigError
from configs.train import ModelConfig, ParallelConfig, TrainSection

RANKS = "the number of ranks"


class _Impossible(Exception):
    """Why a layout cannot be, and the keys that may help with values to try; None: all that divide the ranks."""

    def __init__(self, problem: str, **keys: Sequence[Any] | None) -> None:
        super().__init__(problem)
        self.keys = {_KEYS[name]: values for name, values in keys.items()}


_KEYS = {
    **{name: f"parallel.{name}" for name in ParallelConfig.model_fields},
    "global_batch_size": "train.global_batch_size",
    "seq_length": "train.seq_length",
    "capacity_factor": "model.moe.capacity_factor",
    "ranks": RANKS,
}


@dataclass(frozen=True)
class Layout:
    """A checked layout. `grad_accum_steps` is the number of micro-batches of each data-parallel rank in a step.

    `layers_per_stage` counts the layers of every virtual stage; virtual stage v is chunk v // pp of pipeline rank
    v % pp.
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

    @classmethod
    def of(cls, world_size: int, parallel: ParallelConfig, model: ModelConfig, train: TrainSection) -> "Layout":
        """Checks every degree. Errors: ConfigError naming the numbers, and near values that are legal with the rest."""
        try:
            return cls._checked(world_size, parallel, model, train)
        except _Impossible as impossible:
            remedies = _remedies(impossible, world_size, parallel, model, train)
            raise ConfigError(f"{impossible}; {remedies}") from None

    @classmethod
    def _checked(cls, world_size: int, parallel: ParallelConfig, model: ModelConfig, train: TrainSection) -> "Layout":
        tp, cp, pp, vpp = parallel.tp, parallel.cp, parallel.pp, parallel.vpp
        replica = tp * cp * pp
        if world_size % replica:
            raise _Impossible(
                f"parallel.tp * parallel.cp * parallel.pp = {tp} * {cp} * {pp} = {replica} does not divide the "
                f"{world_size} ranks started",
                ranks=_multiples(replica, world_size),
                tp=None,
                cp=None,
                pp=None,
            )
        _check_zero(parallel)
        _check_tensor_parallel(parallel, model)
        _check_sequence(parallel, model, train)
        layers_per_stage = _split_layers(parallel, model)
        dp = world_size // replica
        _check_experts(parallel, model, dp)
        micro, batch = train.micro_batch_size, train.global_batch_size
        if batch % (dp * micro):
            raise _Impossible(
                f"train.global_batch_size = {batch} is not a multiple of dp * train.micro_batch_size = {dp} * {micro}",
                global_batch_size=_multiples(dp * micro * (pp if vpp > 1 else 1), batch),
            )
        accum = batch // (dp * micro)
        if vpp > 1 and accum % pp:
            raise _Impossible(
                f"parallel.vpp = {vpp} interleaves micro-batches in groups of parallel.pp = {pp}, and a step has "
                f"{accum} on each data-parallel rank",
                global_batch_size=_multiples(dp * micro * pp, batch),
                vpp=(1,),
            )
        zero, offload = parallel.zero, parallel.offload_optimizer
        return cls(world_size, tp, parallel.sp, cp, parallel.ep, pp, vpp, dp, zero, offload, accum, layers_per_stage)

    def __str__(self) -> str:
        sp, vpp = " sp" if self.sp else "", f" vpp{self.vpp}" if self.vpp > 1 else ""
        cp, ep = f" cp{self.cp}" if self.cp > 1 else "", f" ep{self.ep}" if self.ep > 1 else ""
        offload = " offload" if self.offload_optimizer else ""
        return f"tp{self.tp}{sp}{cp} pp{self.pp}{vpp} dp{self.dp}{ep} zero{self.zero}{offload}"

    def layers_of_stage(self, stage: int) -> range:
        """Global indices of the layers of virtual stage `stage`."""
        first = sum(self.layers_per_stage[:stage])
        return range(first, first + self.layers_per_stage[stage])


def _check_tensor_parallel(parallel: ParallelConfig, model: ModelConfig) -> None:
    tp = parallel.tp
    expert_size = "model.moe.ffn_hidden_size" if model.moe and model.moe.ffn_hidden_size else "model.ffn_hidden_size"
    for name, size in (
        ("model.num_heads", model.num_heads),
        ("model.num_kv_heads", model.num_kv_heads),
        (expert_size, model.expert_size),
        ("model.vocab_size", model.vocab_size),
    ):
        if size % tp:
            raise _Impossible(f"{name} = {size} is not a multiple of parallel.tp = {tp}", tp=None)
    if parallel.sp and tp == 1:
        raise _Impossible(
            "parallel.sp = true splits the sequence over the ranks of parallel.tp, and tp = 1 is a single one",
            sp=(False,),
            tp=None,
        )


def _check_sequence(parallel: ParallelConfig, model: ModelConfig, train: TrainSection) -> None:
    """Sequences are split over cp everywhere but in attention, which splits heads instead; sp splits further."""
    tp, cp = parallel.tp, parallel.cp
    parts = cp * (tp if parallel.sp else 1)
    if train.seq_length % parts:
        factors = [f"parallel.cp = {cp}"] * (cp > 1) + [f"parallel.tp = {tp} (parallel.sp = true)"] * parallel.sp
        raise _Impossible(
            f"train.seq_length = {train.seq_length} is not a multiple of {' * '.join(factors)}",
            seq_length=_multiples(parts, train.seq_length),
            cp=None,
        )
    if cp == 1:
        return
    for name, heads in (("model.num_heads", model.num_heads), ("model.num_kv_heads", model.num_kv_heads)):
        if heads % (tp * cp):
            raise _Impossible(
                f"{name} = {heads} is not a multiple of parallel.tp * parallel.cp = {tp} * {cp}, over which attention "
                "splits its heads",
                cp=None,
                tp=None,
            )
    if model.moe and model.moe.capacity_factor is not None:
        raise _Impossible(
            f"model.moe.capacity_factor = {model.moe.capacity_factor} counts an expert's tokens over whole sequences, "
            f"and parallel.cp = {cp} splits them",
            capacity_factor=(None,),
            cp=(1,),
        )


def _check_experts(parallel: ParallelConfig, model: ModelConfig, dp: int) -> None:
    ep, ranks = parallel.ep, dp * parallel.cp
    if ep == 1:
        return
    if model.moe is None:
        raise _Impossible(f"parallel.ep = {ep} spreads experts, and the model has none", ep=(1,))
    if model.moe.num_experts % ep:
        raise _Impossible(
            f"model.moe.num_experts = {model.moe.num_experts} is not a multiple of parallel.ep = {ep}",
            ep=None,
        )
    if ranks % ep:
        raise _Impossible(
            f"parallel.ep = {ep} does not divide dp * cp = {dp} * {parallel.cp} = {ranks}, the ranks that experts are "
            "spread over",
            ep=None,
            ranks=_multiples(parallel.tp * parallel.pp * ep, dp * parallel.cp * parallel.tp * parallel.pp),
        )


def _check_zero(parallel: ParallelConfig) -> None:
    zero, pp, ep = parallel.zero, parallel.pp, parallel.ep
    if zero > 1 and pp > 1:
        raise _Impossible(
            f"parallel.zero = {zero} with parallel.pp = {pp}: ZeRO stages 2 and 3 give gradients away after every "
            "micro-batch, and a pipeline accumulates them over all",
            zero=(1, 2),
            pp=(1,),
        )
    if zero == 3 and ep > 1:
        raise _Impossible(
            f"parallel.zero = 3 with parallel.ep = {ep}: ZeRO stage 3 would split each expert over all data parallel, "
            "ranks that hold other experts among them",
            zero=(1, 2),
            ep=(1,),
        )


def _split_layers(parallel: ParallelConfig, model: ModelConfig) -> tuple[int, ...]:
    pp, vpp, layers = parallel.pp, parallel.vpp, model.num_layers
    stages = pp * vpp
    if vpp > 1 and pp == 1:
        raise _Impossible(
            f"parallel.vpp = {vpp} interleaves chunks of a pipeline, and parallel.pp = 1 is none",
            vpp=(1,),
            pp=None,
        )
    if stages > layers:
        raise _Impossible(
            f"parallel.pp * parallel.vpp = {pp} * {vpp} = {stages} stages are more than model.num_layers = {layers}; "
            "every stage holds a layer or more",
            pp=None,
            vpp=range(1, vpp),
        )
    given = parallel.layers_per_stage
    if given is None:
        head = model.vocab_size * model.hidden_size / model.parameters_per_layer(active=True)
        return balanced_layers(layers, stages, head)
    if len(given) != stages or sum(given) != layers or min(given) < 1:
        raise _Impossible(
            f"parallel.layers_per_stage = {list(given)} are {len(given)} numbers with sum {sum(given)}; they must be "
            f"pp * vpp = {stages} numbers of 1 or more with sum model.num_layers = {layers}",
            layers_per_stage=(None,),
        )
    return given


def balanced_layers(layers: int, stages: int, head: float) -> tuple[int, ...]:
    """Layers of each stage such that the slowest stage is as fast as can be; the last one has the output head too.

    `head` is the head's cost in layers. Looking up embeddings costs next to nothing, so the first stage is like any
    other. Left-over layers go to later stages, since earlier ones keep more micro-batches' activations (1F1B).
    """
    if stages == 1:
        return (layers,)

    def slowest(last: int) -> tuple[float, int]:
        others = -(-(layers - last) // (stages - 1))
        return max(others, last + head), -last  # among equals the one with most layers beside the head: the most even

    last = min(range(1, layers - stages + 2), key=slowest)
    share, left = divmod(layers - last, stages - 1)
    return *(share + (i >= stages - 1 - left) for i in range(stages - 1)), last


def _multiples(unit: int, near: int) -> list[int]:
    """The multiples of `unit` around `near`."""
    return [unit * k for k in range(max(1, near // unit - 2), near // unit + 4)]


def _remedies(
    impossible: _Impossible, world_size: int, parallel: ParallelConfig, model: ModelConfig, train: TrainSection
) -> str:
    """The nearest values of each key that are legal when it alone is changed: tried, not guessed."""
    now = {"parallel": parallel, "train": train}
    found = []
    for key, values in impossible.keys.items():
        section, _, name = key.partition(".")
        present = getattr(now[section], name) if section in now else world_size
        tried = values if values is not None else [d for d in range(1, world_size + 1) if world_size % d == 0]
        legal = [
            value for value in tried if value != present and _is_legal(key, value, world_size, parallel, model, train)
        ]
        if legal == [None]:
            found.append(f"leave out {key}")
        elif legal and isinstance(legal[0], bool):
            found.append(f"{key} could be {str(legal[0]).lower()}")
        elif legal:
            near = [v for v in legal if v < present][-2:] + [v for v in legal if v > present][:2]
            found.append(f"{key} could be {' or '.join(map(str, near))}")
    if found:
        return ", or ".join(found)
    return f"no other value of {' or '.join(impossible.keys)} alone is legal with the rest, so change more than one key"


def _is_legal(
    key: str, value: Any, world_size: int, parallel: ParallelConfig, model: ModelConfig, train: TrainSection
) -> bool:
    section, _, name = key.partition(".")
    if key == RANKS:
        world_size = value
    elif section == "parallel":
        parallel = parallel.model_copy(update={name: value})
    elif section == "train":
        train = train.model_copy(update={name: value})
    else:
        assert model.moe is not None and name == "moe.capacity_factor"
        model = model.model_copy(update={"moe": model.moe.model_copy(update={"capacity_factor": value})})
    try:
        Layout._checked(world_size, parallel, model, train)
    except _Impossible:
        return False
    return True
