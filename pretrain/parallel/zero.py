"""ZeRO by DeepSpeed (Rajbhandari et al. 2020): what data-parallel ranks would all hold is split over them.

Stage 1 splits the fp32 master weights and Adam's moments, 2 the gradients too, 3 the weights too; offloaded, master
weights and moments are in host memory, and Adam runs there. In stage 1 a pipeline schedule runs the backward pass and
gradients are averaged once, at its end. In 2 and 3 they are averaged while backward makes them, micro-batch by
micro-batch, so backward has to be DeepSpeed's own: `schedule` does without a pipeline. Gradients are accumulated and
averaged in fp32 in all of them.

DeepSpeed has three optimizers for it: stage 3 has its own, so has stage 1 in bf16 when not offloaded, and one is for
the rest. They name the same things differently, and this file is where that is known. A proof's fp64 has one of its
own, in stage 1 alone: see `fp64`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.layout import Layout
from configs.train import OptimizerConfig, TrainSection
from pretrain.parallel import fp64
from pretrain.parallel.backends import deepspeed
from pretrain.parallel.expert_parallel import optimizer_groups
from pretrain.parallel.gathered import SavedAsRecipes
from pretrain.parallel.groups import DeepSpeedMpu, Mesh

# In elements.
MAX_BUCKET = 2**26  # of gradients reduced at once, for which memory is reserved
REUSE_DISTANCE = 1_000_000_000  # stage 3 keeps gathered what is used again before so many others: DeepSpeed's default


@dataclass(frozen=True)
class Fragment:
    """The range of a parameter, flattened, whose fp32 state this rank owns, and where in its flat partitions it is."""

    start: int
    numel: int
    partition: int  # of `master_partitions`
    offset: int  # in that partition


def wrap(module: nn.Module, train: TrainSection, optimizer: OptimizerConfig, mesh: Mesh, dtype: torch.dtype) -> Any:
    """A DeepSpeed engine around this stage's module. With stage 3 its weights are taken apart from here on."""
    initialize = fp64.initialize if dtype == torch.float64 else deepspeed.initialize
    engine, _, _, _ = initialize(
        model=module,
        optimizer=torch.optim.AdamW(
            optimizer_groups(_decay_groups(module, optimizer.weight_decay), mesh),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        ),
        config=_config(module, train, optimizer, mesh, dtype),
        mpu=DeepSpeedMpu(),
        dist_init_required=False,
    )
    engine.pipeline_parallelism = mesh.layout.zero == 1
    return engine


def schedule(engine: Any) -> Callable[..., list[Any]]:
    """For stages 2 and 3, instead of megatron-core's schedules and called like them: one stage, no pipeline."""
    stage3 = engine.zero_optimization_stage() == 3
    saved: AbstractContextManager[None] = SavedAsRecipes(engine.module) if stage3 else nullcontext()

    def run(
        *,
        forward_step_func: Callable[[Iterator[Any], Any], tuple[torch.Tensor, Callable[[torch.Tensor], Any]]],
        data_iterator: Iterator[Any],
        num_microbatches: int,
        forward_only: bool,
        **_: Any,
    ) -> list[Any]:
        stored = []
        for i in range(num_microbatches):
            engine.set_gradient_accumulation_boundary(i == num_microbatches - 1)
            with saved:
                output, loss_of = forward_step_func(data_iterator, engine)
            loss, _, sums = loss_of(output)
            if not forward_only:
                engine.backward(loss)
            stored.append(sums)
        return stored

    return run


def average_gradients(engine: Any) -> None:
    """Over data parallel, at the end of a step's backward passes; stages 2 and 3 have done it by then."""
    if engine.zero_optimization_stage() == 1:
        engine.set_gradient_accumulation_boundary(True)
        engine.allreduce_gradients()


def master_partitions(engine: Any) -> list[torch.Tensor]:
    """This rank's flat parts of the fp32 master weights, one or more for an optimizer group; keys of Adam's state."""
    zero = engine.optimizer
    names = ("fp32_groups_flat_partition", "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    return getattr(zero, next(name for name in names if hasattr(zero, name)))


def fragment(engine: Any, parameter: nn.Parameter) -> Fragment | None:
    """What this rank owns of a parameter; None if nothing."""
    known: Any = parameter
    if hasattr(known, "ds_id"):
        zero = engine.optimizer
        partition, offset, size = zero.grad_position[zero.get_param_id(known)]
        start = size * dist.get_rank(known.ds_process_group)
        numel = min(size, known.ds_numel - start)  # the last ranks' shares may be padded, or nothing else
        return Fragment(start, numel, partition, offset) if numel > 0 else None
    mapping = known._hp_mapping
    if mapping is None:
        return None
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(low.start, low.numel, mapping.param_group_index, high.start)


def update_weights(engine: Any) -> None:
    """Gives the model its weights anew after master weights were changed by other hands; collective."""
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for partition in range(len(master_partitions(engine))):
        zero._reassign_or_swap_out_partitioned_parameters(partition)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def outline(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter, or, where stage 3 took its elements away, one of its shape and marks without elements."""
    known: Any = parameter
    if not hasattr(known, "ds_id"):
        return parameter
    like = nn.Parameter(torch.empty(known.ds_shape, dtype=parameter.dtype, device="meta"))
    vars(like).update({name: value for name, value in vars(parameter).items() if not name.startswith("ds_")})
    return like


def current_weight(parameter: nn.Parameter) -> torch.Tensor:
    """The model's weight, whole over data parallel; collective over it in stage 3, where it is a copy."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def full_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """The step's fp32 gradient, after ZeRO's average over data parallel; collective over it."""
    if parameter.dtype == torch.float64:
        return fp64.full(parameter, gradient=True)
    return deepspeed.utils.safe_get_full_grad(parameter)


def full_weight(parameter: nn.Parameter) -> torch.Tensor:
    """The fp32 master weight, put together over data parallel; collective over it."""
    if parameter.dtype == torch.float64:
        return fp64.full(parameter, gradient=False)
    return deepspeed.utils.safe_get_full_fp32_param(parameter)


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient accumulated so far, of the accumulation's dtype: in stage 1 all of it, else this rank's share.

    Ranks of a tensor-parallel group have the same share. It may be empty; it may be flat.
    """
    known: Any = parameter
    for name in ("_hp_grad", "grad_accum", "grad"):
        whole = getattr(known, name, None)
        if whole is not None:
            return whole
    if hasattr(known, "ds_id"):
        return deepspeed.utils.safe_get_local_grad(parameter)
    if known._hp_mapping is None:
        return torch.empty(0, device=parameter.device)
    return known._hp_mapping.get_lp_grad_fragment(known._index_in_param_group)


def set_gradient(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Puts `value`, flat, where `gradient` reads it."""
    known: Any = parameter
    kept = gradient(parameter)
    if hasattr(known, "ds_id"):
        deepspeed.utils.safe_set_local_grad(parameter, value)
        return
    kept.copy_(value.view_as(kept))
    zero = getattr(known, "_zero_optimizer", None)
    if zero is not None and known.grad is None and kept.numel():
        # Offloaded stage 2 takes norms as gradients leave for host memory, and this one just changed there.
        zero.norm_for_param_grads[zero.get_param_id(parameter)] = value.double().norm()


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decay = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"name": "decayed", "params": decay, "weight_decay": weight_decay},
        {"name": "not_decayed", "params": rest, "weight_decay": 0.0},
    ]


def _config(
    module: nn.Module, train: TrainSection, optimizer: OptimizerConfig, mesh: Mesh, dtype: torch.dtype
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # ours: DeepSpeed is told which backward pass is a step's last
        "gradient_clipping": optimizer.clip_grad,
        "zero_optimization": _stage(module, mesh.layout),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own Adam on the CPU compiles at run time
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _stage(module: nn.Module, layout: Layout) -> dict[str, Any]:
    stage: dict[str, Any] = {
        "stage": layout.zero,
        # Without it DeepSpeed would sum experts' gradients over all data parallel, other experts' among them.
        "contiguous_gradients": True,
        "reduce_bucket_size": min(MAX_BUCKET, sum(p.numel() for p in module.parameters())),
    }
    if layout.zero == 3:
        # Norm weights stay whole: to gather one costs a round trip, and to split it saves next to nothing.
        stage["stage3_max_reuse_distance"] = REUSE_DISTANCE
        stage["stage3_param_persistence_threshold"] = max(p.numel() for p in module.parameters() if p.ndim == 1)
    if layout.offload_optimizer:
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return stage
