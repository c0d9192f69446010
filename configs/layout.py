"""All degrees of parallelism against model, batch and world size, in one place. No torch, so a login node can ask.

World size = dp * pp * tp (cp and ep are not built yet, see `Layout.of`). Rank order is megatron-core's
"tp-cp-ep-dp-pp": tensor-parallel ranks are neighbours, pipeline stages are farthest apart.
"""

from dataclasses import dataclass

from configs.loader import ConfigError
from configs.train import ModelConfig, ParallelConfig, TrainSection


@dataclass(frozen=True)
class Layout:
    """A checked layout. `grad_accum_steps` is the number of micro-batches of each data-parallel rank in a step."""

    world_size: int
    tp: int
    pp: int
    dp: int
    zero: int
    grad_accum_steps: int

    @classmethod
    def of(cls, world_size: int, parallel: ParallelConfig, model: ModelConfig, train: TrainSection) -> "Layout":
        """Checks every degree. Errors: ConfigError naming the numbers and the nearest legal choices."""
        _refuse_unbuilt(parallel)
        tp, pp = parallel.tp, parallel.pp
        if world_size % (tp * pp):
            raise ConfigError(
                f"parallel.tp * parallel.pp = {tp} * {pp} = {tp * pp} does not divide the {world_size} ranks started; "
                f"start a multiple of {tp * pp} ranks (torchrun --nproc-per-node) or change tp or pp"
            )
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
        if model.num_layers % pp:
            raise ConfigError(
                f"model.num_layers = {model.num_layers} does not split evenly over parallel.pp = {pp} stages; "
                f"pp could be {_divisors(model.num_layers, pp)}"
            )
        dp = world_size // (tp * pp)
        micro, batch = train.micro_batch_size, train.global_batch_size
        if batch % (dp * micro):
            raise ConfigError(
                f"train.global_batch_size = {batch} is not a multiple of dp * train.micro_batch_size = {dp} * {micro}; "
                f"the nearest that is: {max(1, round(batch / (dp * micro))) * dp * micro}"
            )
        return cls(world_size, tp, pp, dp, parallel.zero, batch // (dp * micro))

    def __str__(self) -> str:
        return f"tp{self.tp} pp{self.pp} dp{self.dp} zero{self.zero}"

    def layers_of_stage(self, num_layers: int, stage: int) -> range:
        """Global indices of the layers that pipeline stage `stage` holds."""
        share = num_layers // self.pp
        return range(stage * share, (stage + 1) * share)


def _refuse_unbuilt(parallel: ParallelConfig) -> None:
    if parallel.zero != 1:
        raise ConfigError(
            f"parallel.zero = {parallel.zero} is not built yet; only ZeRO stage 1 is: set parallel.zero=1"
        )
    if parallel.sp:
        raise ConfigError("parallel.sp = true (sequence parallel) is not built yet; set parallel.sp=false")
    for name in ("vpp", "ep", "cp"):
        degree = getattr(parallel, name)
        if degree != 1:
            raise ConfigError(f"parallel.{name} = {degree} is not built yet; set parallel.{name}=1")


def _divisors(size: int, near: int) -> str:
    choices = [d for d in range(1, size + 1) if size % d == 0]
    below, above = [d for d in choices if d < near][-2:], [d for d in choices if d > near][:2]
    return " or ".join(map(str, below + above))
