"""All degrees of parallelism against model, batch and world size, in one place. No torch, so a login node can ask.

World size = dp * pp * tp (cp and ep are not built yet, see `Layout.of`). Rank order is megatron-core's
"tp-cp-ep-dp-pp": tensor-parallel ranks are neighbours, pipeline stages are farthest apart.
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
    pp: int
    vpp: int
    dp: int
    zero: int
    grad_accum_steps: int
    layers_per_stage: tuple[int, ...]

    @classmethod
    def of(cls, world_size: int, parallel: ParallelConfig, model: ModelConfig, train: TrainSection) -> "Layout":
        """Checks every degree. Errors: ConfigError naming the numbers and the nearest legal choices."""
        _refuse_unbuilt(parallel)
        tp, pp, vpp = parallel.tp, parallel.pp, parallel.vpp
        if world_size % (tp * pp):
            raise ConfigError(
                f"parallel.tp * parallel.pp = {tp} * {pp} = {tp * pp} does not divide the {world_size} ranks started; "
                f"start a multiple of {tp * pp} ranks (torchrun --nproc-per-node) or change tp or pp"
            )
        _check_tensor_parallel(parallel, model, train)
        layers_per_stage = _split_layers(parallel, model)
        dp = world_size // (tp * pp)
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
        return cls(world_size, tp, parallel.sp, pp, vpp, dp, parallel.zero, accum, layers_per_stage)

    def __str__(self) -> str:
        sp, vpp = " sp" if self.sp else "", f" vpp{self.vpp}" if self.vpp > 1 else ""
        return f"tp{self.tp}{sp} pp{self.pp}{vpp} dp{self.dp} zero{self.zero}"

    def layers_of_stage(self, stage: int) -> range:
        """Global indices of the layers of virtual stage `stage`."""
        first = sum(self.layers_per_stage[:stage])
        return range(first, first + self.layers_per_stage[stage])


def _check_tensor_parallel(parallel: ParallelConfig, model: ModelConfig, train: TrainSection) -> None:
    tp = parallel.tp
    for name, size in (
        ("model.num_heads", model.num_heads),
        ("model.num_kv_heads", model.num_kv_heads),
        ("model.ffn_hidden_size", model.ffn_hidden_size),
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
    if parallel.sp and train.seq_length % tp:
        raise ConfigError(
            f"train.seq_length = {train.seq_length} is not a multiple of parallel.tp = {tp}, as parallel.sp = true "
            f"needs it to be; the nearest that is: {max(1, round(train.seq_length / tp)) * tp}"
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


def _refuse_unbuilt(parallel: ParallelConfig) -> None:
    if parallel.zero != 1:
        raise ConfigError(
            f"parallel.zero = {parallel.zero} is not built yet; only ZeRO stage 1 is: set parallel.zero=1"
        )
    for name in ("ep", "cp"):
        degree = getattr(parallel, name)
        if degree != 1:
            raise ConfigError(f"parallel.{name} = {degree} is not built yet; set parallel.{name}=1")


def _divisors(size: int, near: int) -> str:
    choices = [d for d in range(1, size + 1) if size % d == 0]
    below, above = [d for d in choices if d < near][-2:], [d for d in choices if d > near][:2]
    return " or ".join(map(str, below + above))
