"""Expert parallelism: registers the experts' process groups with DeepSpeed.

Each data-parallel rank of an expert-parallel group holds a part of every layer's experts. ZeRO must average and split
an expert's gradients over the ranks that hold this expert, and not over all data-parallel ranks. Tokens are sent to
their experts in `pretrain.model.moe.dispatch`.
"""

from typing import Any

import torch
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups as deepspeed_groups
from torch import nn

from pretrain.model.slices import is_expert
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage


def spread_experts(stage: PipelineStage, mesh: Mesh) -> None:
    """Registers the expert groups with DeepSpeed and marks expert parameters as theirs; does nothing at ep=1.

    It does nothing, too, on a pipeline stage whose layers all have plain MLPs.
    """
    ep = mesh.layout.ep
    if ep == 1 or not stage.moe_layers:
        return
    name = f"ep_size_{ep}"
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep_group
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.expert_dp_group
    # Without this, the grad norm of stage 1 in bf16 misses the other tensor-parallel ranks' parts of the experts.
    deepspeed_groups.expert_tensor_parallel_world_size = mesh.layout.tp
    for parameter in stage.parameters():
        if is_expert(parameter):
            vars(parameter).update(allreduce=False, group_name=name)
    stage.register_module("expert_parallel_here", _MoEMarker(stage, ep, name))


def optimizer_groups(groups: list[dict[str, Any]], mesh: Mesh) -> list[dict[str, Any]]:
    """Splits optimizer groups so that experts have groups of their own, which ZeRO requires at ep>1."""
    if mesh.layout.ep == 1:
        return groups
    return split_params_into_different_moe_groups_for_optimizer(groups, max_group_size=None)


class _MoEMarker(DeepSpeedMoE):
    """A module that computes nothing: DeepSpeed looks for experts only in models that contain its MoE class."""

    def __init__(self, stage: PipelineStage, ep: int, name: str):
        nn.Module.__init__(self)
        self.ep_size, self.expert_group_name = ep, name
        self.num_experts = next(iter(stage.moe_layers.values())).config.num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Does nothing, since `spread_experts` has registered the groups."""

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("this module only marks the model as one with experts")
