"""ZeRO (Rajbhandari et al. 2020): splits over data-parallel ranks the state that each would hold whole.

Stage 1 splits the fp32 master weights and Adam's moments, stage 2 also the gradients, stage 3 also the weights. With
offloading, master weights and moments are in host memory, and Adam runs there. Stage 1 without offloading is
`distributed_optimizer`, in every precision; all else is DeepSpeed's. In stage 1 the pipeline schedule runs the backward
pass. In stages 2 and 3 gradients are averaged during the backward pass of every micro-batch, so it must be DeepSpeed's
own: `schedule` runs it, without a pipeline. All stages accumulate and average gradients in fp32.

DeepSpeed has two optimizer classes for this: one for stage 3 and one for the rest. They name the same state
differently, and so does `distributed_optimizer`; only this file depends on the names.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.layout import Layout
from configs.train import OptimizerConfig, TrainSection
from pretrain.model.initial_weights import Drawing
from pretrain.model.slices import marks_of
from pretrain.parallel import distributed_optimizer
from pretrain.parallel.deepspeed_import import deepspeed, device_as_local_rank
from pretrain.parallel.distributed_optimizer import DistributedOptimizer, Fragment
from pretrain.parallel.expert_parallel import optimizer_groups
from pretrain.parallel.gathered import RebuiltViews
from pretrain.parallel.groups import DeepSpeedMpu, Mesh
from pretrain.parallel.pipeline_stage import PipelineStage
from pretrain.parallel.split_weights import SplitAfterDrawing, WithoutMemory

MAX_BUCKET = 2**26  # elements of gradients reduced at once; DeepSpeed reserves memory for so many
# Stage 3 keeps a weight gathered if fewer elements of other weights are used before its next use; DeepSpeed's default.
REUSE_DISTANCE = 1_000_000_000


def weights(mesh: Mesh, dtype: torch.dtype) -> tuple[AbstractContextManager[Any], Drawing]:
    """Returns contexts in which modules are built and in which each weight is drawn; stage 3 splits weights there."""
    if mesh.layout.zero < 3:
        return nullcontext(), nullcontext
    return WithoutMemory(), SplitAfterDrawing(mesh, dtype)


def wrap(module: PipelineStage, train: TrainSection, optimizer: OptimizerConfig, mesh: Mesh, dtype: torch.dtype) -> Any:
    """Makes the optimizer of a pipeline stage: a `DistributedOptimizer`, or a DeepSpeed engine.

    Stage 3 has split the module's weights before, see `weights`.
    """
    if mesh.layout.zero == 1 and not mesh.layout.offload_optimizer:
        return DistributedOptimizer(module, optimizer, mesh)
    with device_as_local_rank(mesh.device):
        engine, _, _, _ = deepspeed.initialize(
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
    """Returns a schedule for stages 2 and 3, called like megatron-core's, that runs micro-batches in turn."""
    stage3 = engine.zero_optimization_stage() == 3
    saved: AbstractContextManager[None] = RebuiltViews(engine.module) if stage3 else nullcontext()

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


def loss_factor(engine: Any, mesh: Mesh) -> float:
    """Returns the factor by which losses are multiplied so that gradients become sums over data parallel.

    DeepSpeed averages gradients; `DistributedOptimizer` sums them.
    """
    return 1.0 if isinstance(engine, DistributedOptimizer) else float(mesh.zero_size)


def begin_step(engine: Any, num_microbatches: int) -> None:
    """Clears the last step's gradients, where the optimizer does not do so by itself."""
    if isinstance(engine, DistributedOptimizer):
        engine.begin(num_microbatches)


def finish_backward(engine: Any) -> None:
    """Waits for the sums of gradients that began during the step's backward passes."""
    if isinstance(engine, DistributedOptimizer):
        engine.finish()


def average_gradients(engine: Any) -> None:
    """Averages gradients over data parallel in DeepSpeed's stage 1; all others have already done so."""
    if not isinstance(engine, DistributedOptimizer) and engine.zero_optimization_stage() == 1:
        engine.set_gradient_accumulation_boundary(True)
        engine.allreduce_gradients()


def step(engine: Any, lr: float, largest_norm: torch.Tensor | float = math.inf) -> torch.Tensor:
    """Clips gradients and updates the weights; returns the gradient norm before clipping, on the device.

    Where the norm is not finite, or above `largest_norm`, which DeepSpeed's optimizers do not know, no weight changes.
    """
    if isinstance(engine, DistributedOptimizer):
        return engine.step(lr, largest_norm)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.step()
    norm = float("nan") if engine.optimizer.overflow else float(engine.get_global_grad_norm())
    return torch.tensor(norm, dtype=torch.float64, device=engine.device)


def adam(engine: Any) -> torch.optim.AdamW:
    """Returns the torch optimizer whose state holds the moments of each master partition."""
    return engine.adam if isinstance(engine, DistributedOptimizer) else engine.optimizer.optimizer


def master_partitions(engine: Any) -> list[torch.Tensor]:
    """Returns this rank's flat parts of the fp32 master weights, one or more a group. They are keys of Adam's state."""
    if isinstance(engine, DistributedOptimizer):
        return [bucket.master for bucket in engine.buckets]
    zero = engine.optimizer
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
    return getattr(zero, next(name for name in names if hasattr(zero, name)))


def fragment(engine: Any, parameter: nn.Parameter) -> Fragment | None:
    """Returns the range of a parameter that this rank owns, or None if it owns none of it or it is frozen."""
    if not parameter.requires_grad:
        return None
    if isinstance(engine, DistributedOptimizer):
        return engine.fragment(parameter)
    known: Any = parameter
    if hasattr(known, "ds_id"):
        zero = engine.optimizer
        partition, offset, size = zero.grad_position[zero.get_param_id(known)]
        start = size * dist.get_rank(known.ds_process_group)
        numel = min(size, known.ds_numel - start)  # the last ranks' shares may hold padding, or padding alone
        return Fragment(start, numel, partition, offset) if numel > 0 else None
    mapping = known._hp_mapping
    if mapping is None:
        return None
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(low.start, low.numel, mapping.param_group_index, high.start)


def memory_of(engine: Any) -> dict[str, int]:
    """Returns the bytes of this rank's trained weights, gradients and optimizer state, padding and buckets included.

    Those of gradients are what a step needs at its end, when they are whole: DeepSpeed frees some of them after it.
    """
    masters = master_partitions(engine)
    moments = [value for state in adam(engine).state.values() for value in state.values() if torch.is_tensor(value)]
    if isinstance(engine, DistributedOptimizer):
        weights = [bucket.weights for bucket in engine.buckets]
        gradients = _bytes([bucket.gradients for bucket in engine.buckets])
        masters = [bucket.master for bucket in engine.buckets if bucket.master.dtype != bucket.weights.dtype]
    else:
        weights = [tensor for parameter in engine.module.parameters() for tensor in _own_tensors(parameter)]
        wide = torch.float32.itemsize  # gradients are accumulated and averaged in fp32
        whole = engine.zero_optimization_stage() == 1  # its gradients are averaged at the end of a step, none is split
        own = sum(weight.numel() for weight in weights) if whole else sum(master.numel() for master in masters)
        gradients = wide * (own + engine.optimizer.reduce_bucket_size)
    return {"weights": _bytes(weights), "gradients": gradients, "optimizer": _bytes([*moments, *masters])}


def _own_tensors(parameter: nn.Parameter) -> list[torch.Tensor]:
    """Returns what this rank keeps of a weight between steps; stage 3 keeps small ones whole beside its share."""
    known: Any = parameter
    if not hasattr(known, "ds_id"):
        return [parameter]
    return [known.ds_tensor, *([parameter.data] if known.ds_persist else [])]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def update_weights(engine: Any) -> None:
    """Copies master weights into the model after anything but the optimizer changed them; collective."""
    if isinstance(engine, DistributedOptimizer):
        engine.gather_weights()
        return
    zero = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for partition in range(len(master_partitions(engine))):
        zero._reassign_or_swap_out_partitioned_parameters(partition)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def wait_for_weights(engine: Any) -> None:
    """Waits until the weights of the last step have arrived from all ranks.

    Layers wait for theirs. All else that reads a parameter itself calls this first, or `current_weight`.
    """
    if isinstance(engine, DistributedOptimizer):
        engine.wait_for_weights()


def outline(parameter: nn.Parameter) -> nn.Parameter:
    """Returns the parameter; where stage 3 has split it, a meta tensor of its whole shape with the same marks."""
    known: Any = parameter
    if not hasattr(known, "ds_id"):
        return parameter
    like = nn.Parameter(torch.empty(known.ds_shape, dtype=parameter.dtype, device="meta"))
    vars(like).update({name: value for name, value in vars(parameter).items() if not name.startswith("ds_")})
    return like


def current_weight(parameter: nn.Parameter) -> torch.Tensor:
    """Returns the model's weight, whole over data parallel; in stage 3 a copy, gathered collectively."""
    if distributed_optimizer.is_in_bucket(parameter):
        distributed_optimizer.wait_for_weight(parameter)
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def full_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Gathers the step's gradient, averaged over data parallel, in fp32 (or fp64); collective over data parallel."""
    if distributed_optimizer.is_in_bucket(parameter):
        return distributed_optimizer.full(parameter, gradient=True)
    return deepspeed.utils.safe_get_full_grad(parameter)


def full_weight(parameter: nn.Parameter) -> torch.Tensor:
    """Gathers the master weight in fp32 (or fp64); collective over data parallel. A frozen weight has no other."""
    if not parameter.requires_grad:
        return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
    if distributed_optimizer.is_in_bucket(parameter):
        return distributed_optimizer.full(parameter, gradient=False)
    return deepspeed.utils.safe_get_full_fp32_param(parameter)


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Returns the gradient accumulated so far: this rank's share, or in DeepSpeed's stage 1 the whole.

    All ranks of a tensor-parallel group own the same share, which may be empty and may be flat.
    """
    if distributed_optimizer.is_in_bucket(parameter):
        return distributed_optimizer.own_gradient(parameter)
    known: Any = parameter
    for name in ("grad_accum", "grad"):
        whole = getattr(known, name, None)
        if whole is not None:
            return whole
    if hasattr(known, "ds_id"):
        return deepspeed.utils.safe_get_local_grad(parameter)
    if known._hp_mapping is None:
        return torch.empty(0, device=parameter.device)
    return known._hp_mapping.get_lp_grad_fragment(known._index_in_param_group)


def own_weight(parameter: nn.Parameter) -> torch.Tensor:
    """Returns this rank's elements of the master weight, flat, a view; for ZeRO stage 1 without offloading."""
    return distributed_optimizer.own_elements(parameter, gradient=False)[1]


def set_gradient(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Replaces the gradient that `gradient` returns by the flat tensor `value`."""
    known: Any = parameter
    kept = gradient(parameter)
    if hasattr(known, "ds_id"):
        deepspeed.utils.safe_set_local_grad(parameter, value)
        return
    kept.copy_(value.view_as(kept))
    zero = getattr(known, "_zero_optimizer", None)
    if zero is not None and known.grad is None and kept.numel():
        # Offloaded stage 2 computes norms when gradients move to host memory; this one has changed since.
        zero.norm_for_param_grads[zero.get_param_id(parameter)] = value.double().norm()


def add_to_gradient(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Adds to the gradient of this rank's elements their part of `value`; for ZeRO stage 1 without offloading."""
    first, own = distributed_optimizer.own_elements(parameter, gradient=True)
    own += value.flatten()[first : first + len(own)]


def multiply_weight(parameter: nn.Parameter, factor: torch.Tensor) -> None:
    """Multiplies each element of a weight by 0 or 1 under ZeRO stage 1, in the master weight and in the model."""
    distributed_optimizer.wait_for_weight(parameter)
    first, own = distributed_optimizer.own_elements(parameter, gradient=False)
    own *= factor.flatten()[first : first + len(own)]
    parameter.data.mul_(factor)


def steps_done(engine: Any) -> int:
    """Returns the number of the optimizer's steps, those before a checkpoint among them."""
    states = (adam(engine).state.get(part, {}) for part in master_partitions(engine))
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decay = [p for p in module.parameters() if marks_of(p).decays]
    rest = [p for p in module.parameters() if not marks_of(p).decays]
    return [
        {"name": "decayed", "params": decay, "weight_decay": weight_decay},
        {"name": "not_decayed", "params": rest, "weight_decay": 0.0},
    ]


def _config(
    module: nn.Module, train: TrainSection, optimizer: OptimizerConfig, mesh: Mesh, dtype: torch.dtype
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the engine itself says which backward pass is a step's last
        "gradient_clipping": optimizer.clip_grad,
        "zero_optimization": _stage(module, mesh.layout),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's CPU Adam is compiled at run time
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _stage(module: nn.Module, layout: Layout) -> dict[str, Any]:
    whole = [(outline(parameter).numel(), marks_of(parameter)) for parameter in module.parameters()]
    stage: dict[str, Any] = {
        "stage": layout.zero,
        # Without this DeepSpeed would sum the gradients of different experts over all data-parallel ranks.
        "contiguous_gradients": True,
        "reduce_bucket_size": min(MAX_BUCKET, sum(size for size, _ in whole)),
    }
    if layout.zero == 3:
        # Norm weights and biases stay whole: gathering one costs a round trip, splitting it would save little memory.
        stage["stage3_max_reuse_distance"] = REUSE_DISTANCE
        stage["stage3_param_persistence_threshold"] = max(
            size for size, marks in whole if not (marks.decays or marks.is_expert)
        )
    if layout.offload_optimizer:
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return stage
