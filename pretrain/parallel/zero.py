"""ZeRO stage 1 by DeepSpeed: fp32 master weights and Adam's moments, split over data parallel.

DeepSpeed has two optimizers for it: in fp32 `DeepSpeedZeroOptimizer`; in bf16 with gradients accumulated in fp32,
`BF16_Optimizer`. They name the same things differently, and this file is where that is known.
"""

from typing import Any

import torch
from torch import nn

from configs.train import OptimizerConfig, TrainSection
from pretrain.parallel.backends import deepspeed
from pretrain.parallel.experts import optimizer_groups
from pretrain.parallel.groups import DeepSpeedUnit, Place


def wrap(module: nn.Module, train: TrainSection, optimizer: OptimizerConfig, place: Place, dtype: torch.dtype) -> Any:
    """A DeepSpeed engine around this stage's module, whose backward pass a pipeline schedule runs."""
    engine, _, _, _ = deepspeed.initialize(
        model=module,
        optimizer=torch.optim.AdamW(
            optimizer_groups(_decay_groups(module, optimizer.weight_decay), place),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        ),
        config=_config(train, optimizer, place.zero_size, dtype),
        mpu=DeepSpeedUnit(),
        dist_init_required=False,
    )
    engine.pipeline_parallelism = True
    return engine


def master_partitions(engine: Any) -> list[torch.Tensor]:
    """This rank's flat part of the fp32 master weights, one for each optimizer group; keys of Adam's state."""
    zero = engine.optimizer
    bf16 = hasattr(zero, "fp32_groups_flat_partition")
    return zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups


def full_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """The step's fp32 gradient, after ZeRO's average over data parallel; collective over it."""
    return deepspeed.utils.safe_get_full_grad(parameter)


def full_weight(parameter: nn.Parameter) -> torch.Tensor:
    """The fp32 master weight, put together over data parallel; collective over it."""
    return deepspeed.utils.safe_get_full_fp32_param(parameter)


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    """The gradient accumulated so far: in bf16 the fp32 buffer, flat; else the parameter's own."""
    result = getattr(parameter, "_hp_grad", None)
    result = parameter.grad if result is None else result
    assert result is not None, "a parameter of the step has no gradient"
    return result


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    decay = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    return [
        {"name": "decayed", "params": decay, "weight_decay": weight_decay},
        {"name": "not_decayed", "params": rest, "weight_decay": 0.0},
    ]


def _config(train: TrainSection, optimizer: OptimizerConfig, ranks: int, dtype: torch.dtype) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # ours: DeepSpeed sees one backward pass a step, of all micro-batches
        "gradient_clipping": optimizer.clip_grad,
        "zero_optimization": {
            "stage": 1,
            # Without it DeepSpeed would sum experts' gradients over all data parallel, other experts' among them.
            "contiguous_gradients": True,
            "reduce_bucket_size": 2**26,
            "overlap_comm": False,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True, "immediate_grad_update": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
