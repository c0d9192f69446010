"""ZeRO stage 1 in fp64, for `trivium prove --precision fp64` alone.

DeepSpeed's ZeRO keeps master weights, gradients and their sums over ranks in fp32 whatever the model's precision, and
rounds the gradient norm, by which it clips, to fp32. The subclass here changes these data types to fp64. Flattening,
partitions, reduction, step and all-gather remain DeepSpeed's.
"""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from pretrain.parallel.deepspeed_import import deepspeed


class DoubleZeroOptimizer(deepspeed.runtime.engine.DeepSpeedZeroOptimizer):
    """DeepSpeed's stage-1 optimizer with master weights, gradients and gradient norm in fp64."""

    def __init__(self, *args: Any, **settings: Any):
        wide = {"gradient_accumulation_dtype": torch.float64, "communication_data_type": torch.float64}
        super().__init__(*args, **{**settings, **wide})

    def _configure_master_weights(self, **settings: Any) -> torch.dtype:
        super()._configure_master_weights(**settings)
        return torch.float64

    def get_grad_norm_direct(
        self, gradients: Sequence[torch.Tensor], params: Sequence[nn.Parameter], norm_type: float = 2
    ) -> torch.Tensor:
        """Computes the global norm, in which replicated weights count on the first tensor-parallel rank alone."""
        assert norm_type == 2
        fragments = [g for g in gradients if not getattr(g, "_zero_padding", False)]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradient, parameter in zip(fragments, params):  # noqa: B905  a rank that owns nothing holds padding alone
            split = deepspeed.runtime.utils.is_model_parallel_parameter(parameter)
            if not getattr(parameter, "ds_pipe_replicated", False) and (split or self.model_parallel_rank == 0):
                total += gradient.square().sum()
        dist.all_reduce(total, group=self.dp_process_group)
        self._model_parallel_all_reduce(total, dist.ReduceOp.SUM)
        return total.sqrt()


def initialize(**settings: Any) -> Any:
    """Calls `deepspeed.initialize` with `DoubleZeroOptimizer` in place of DeepSpeed's optimizer class."""
    with mock.patch.object(deepspeed.runtime.engine, "DeepSpeedZeroOptimizer", DoubleZeroOptimizer):
        return deepspeed.initialize(**settings)


def full(parameter: nn.Parameter, gradient: bool) -> torch.Tensor:
    """Gathers the whole fp64 gradient or master weight over data parallel; DeepSpeed's own function rounds to fp32."""
    ours: Any = parameter
    result = torch.zeros_like(parameter, dtype=torch.float64).flatten()
    if ours._hp_mapping is not None:  # this rank owns a range of the parameter
        mapping, address = ours._hp_mapping, ours._hp_mapping.lp_fragment_address
        owned = mapping.get_lp_grad_fragment(ours._index_in_param_group) if gradient else mapping.get_hp_fragment()
        result.narrow(0, address.start, address.numel).copy_(owned.flatten())
    dist.all_reduce(result, group=ours._dp_group)
    return result.view_as(parameter)
