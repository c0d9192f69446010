"""All degrees of parallelism against model, batch and world size, in one place. No torch, so a login node can ask.

World size = dp * pp * cp * tp; experts are spread over ep of the dp * cp ranks that otherwise hold the same weights.
Rank order is megatron-core's "tp-cp-ep-dp-pp": tensor-parallel ranks are neighbours, pipeline stages are farthest
apart.
"""

from dataclasses import dataclass

from configs.loader import ConfigError
from configs.train import ModelConfig, ParallelConfig, TrainSection


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
        """Checks every degree. Errors: ConfigError naming the numbers and the nearest legal choices."""
        tp, cp, pp, vpp = parallel.tp, parallel.cp, parallel.pp, parallel.vpp
        replica = tp * cp * pp
        if world_size % replica:
            raise ConfigError(
                f"parallel.tp * parallel.cp * parallel.pp = {tp} * {cp} * {pp} = {replica} does not divide the "
                f"{world_size} ranks started; start a multiple of {replica} ranks (torchrun --nproc-per-node) or "
                "change tp, cp or pp"
            )
        _check_zero(parallel)
        _check_tensor_parallel(parallel, model)
        _check_sequence(parallel, model, train)
        layers_per_stage = _split_layers(parallel, model)
        dp = world_size // replica
        _check_experts(parallel, model, dp)
        micro, batch = train.micro_batch_size, train.global_batch_size
        if batch % (dp * micro):
            raise ConfigError(
                f"train.global_batch_size = {batch} is not a multiple of dp * train.micro_batch_size = {dp} * {micro}; "
                f"the nearest that is: {max(1, round(batch / (dp * micro))) * dp * micro}"
            )
        accum = batch // (dp * micro)
        if vpp > 1 and accum % pp:
            raise ConfigError(
                f"parallel.vpp = {vpp} interleaves micro-batches in groups of parallel.pp = {pp}, and a step has "
                f"{accum} on each data-parallel rank; use a train.global_batch_size that is a multiple of "
                f"{dp * micro * pp}, or vpp=1"
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
            raise ConfigError(
                f"{name} = {size} is not a multiple of parallel.tp = {tp}; tp could be {_divisors(size, tp)}"
            )
    if parallel.sp and tp == 1:
        raise ConfigError(
            "parallel.sp = true splits the sequence over the ranks of parallel.tp, and tp = 1 is a single one; set "
            "parallel.sp=false, or a tp of 2 or more"
        )


def _check_sequence(parallel: ParallelConfig, model: ModelConfig, train: TrainSection) -> None:
    """Sequences are split over cp everywhere but in attention, which splits heads instead; sp splits further."""
    tp, cp = parallel.tp, parallel.cp
    parts = cp * (tp if parallel.sp else 1)
    if train.seq_length % parts:
        factors = [f"parallel.cp = {cp}"] * (cp > 1) + [f"parallel.tp = {tp} (parallel.sp = true)"] * parallel.sp
        raise ConfigError(
            f"train.seq_length = {train.seq_length} is not a multiple of {' * '.join(factors)}; the nearest that is: "
            f"{max(1, round(train.seq_length / parts)) * parts}"
        )
    if cp == 1:
        return
    for name, heads in (("model.num_heads", model.num_heads), ("model.num_kv_heads", model.num_kv_heads)):
        if heads % (tp * cp):
            raise ConfigError(
                f"{name} = {heads} is not a multiple of parallel.tp * parallel.cp = {tp} * {cp}, over which attention "
                f"splits its heads; cp could be {_divisors(heads // tp, cp)}"
            )
    if model.moe and model.moe.capacity_factor is not None:
        raise ConfigError(
            f"model.moe.capacity_factor = {model.moe.capacity_factor} counts an expert's tokens over whole sequences, "
            f"and parallel.cp = {cp} splits them; leave out capacity_factor (nothing is dropped) or set parallel.cp=1"
        )


def _check_experts(parallel: ParallelConfig, model: ModelConfig, dp: int) -> None:
    ep, ranks = parallel.ep, dp * parallel.cp
    if ep == 1:
        return
    if model.moe is None:
        raise ConfigError(f"parallel.ep = {ep} spreads experts, and the model has none; set parallel.ep=1")
    if model.moe.num_experts % ep:
        raise ConfigError(
            f"model.moe.num_experts = {model.moe.num_experts} is not a multiple of parallel.ep = {ep}; ep could be "
            f"{_divisors(model.moe.num_experts, ep)}"
        )
    if ranks % ep:
        raise ConfigError(
            f"parallel.ep = {ep} does not divide dp * cp = {dp} * {parallel.cp} = {ranks}, the ranks that experts are "
            f"spread over; ep could be {_divisors(ranks, ep)}, or start more ranks"
        )


def _check_zero(parallel: ParallelConfig) -> None:
    zero, pp, ep = parallel.zero, parallel.pp, parallel.ep
    if zero > 1 and pp > 1:
        raise ConfigError(
            f"parallel.zero = {zero} with parallel.pp = {pp}: ZeRO stages 2 and 3 give gradients away after every "
            "micro-batch, and a pipeline accumulates them over all; set parallel.zero=1, or parallel.pp=1"
        )
    if zero == 3 and ep > 1:
        raise ConfigError(
            f"parallel.zero = 3 with parallel.ep = {ep}: ZeRO stage 3 would split each expert over all data parallel, "
            "ranks that hold other experts among them; set parallel.zero=2, or parallel.ep=1"
        )


def _split_layers(parallel: ParallelConfig, model: ModelConfig) -> tuple[int, ...]:
    pp, vpp, layers = parallel.pp, parallel.vpp, model.num_layers
    stages = pp * vpp
    if vpp > 1 and pp == 1:
        raise ConfigError(
            f"parallel.vpp = {vpp} interleaves chunks of a pipeline, and parallel.pp = 1 is none; set vpp=1 or pp=2"
        )
    if stages > layers:
        raise ConfigError(
            f"parallel.pp * parallel.vpp = {pp} * {vpp} = {stages} stages are more than model.num_layers = {layers}; "
            "every stage holds a layer or more, so lower pp or vpp"
        )
    given = parallel.layers_per_stage
    if given is None:
        head = model.vocab_size * model.hidden_size / model.parameters_per_layer(active=True)
        return balanced_layers(layers, stages, head)
    if len(given) != stages or sum(given) != layers or min(given) < 1:
        raise ConfigError(
            f"parallel.layers_per_stage = {list(given)} are {len(given)} numbers with sum {sum(given)}; they must be "
            f"pp * vpp = {stages} numbers of 1 or more with sum model.num_layers = {layers}"
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


def _divisors(size: int, near: int) -> str:
    choices = [d for d in range(1, size + 1) if size % d == 0]
    below, above = [d for d in choices if d < near][-2:], [d for d in choices if d > near][:2]
    return " or ".join(map(str, below + above))
