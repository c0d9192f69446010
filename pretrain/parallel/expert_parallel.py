"""Expert parallel: the experts of each layer spread over ranks that are otherwise data parallel.

What dispatches tokens is `model.dispatch`; here is what DeepSpeed must be told, so that ZeRO splits and averages an
expert over the ranks that hold it, and not over all data parallel.
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
    """Marks expert parameters with the group that holds them, and makes DeepSpeed see that there are some."""
    ep = mesh.layout.ep
    if ep == 1:
        return
    name = f"ep_size_{ep}"
    deepspeed_groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep_group
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.expert_dp_group
    for parameter in stage.parameters():
        if is_expert(parameter):
            vars(parameter).update(allreduce=False, group_name=name)
    stage.register_module("expert_parallel_here", _MoEMarker(stage, ep, name))


def optimizer_groups(groups: list[dict[str, Any]], mesh: Mesh) -> list[dict[str, Any]]:
    """With experts in groups of their own, as ZeRO wants them."""
    if mesh.layout.ep == 1:
        return groups
    return split_params_into_different_moe_groups_for_optimizer(groups, max_group_size=None)


class _MoEMarker(DeepSpeedMoE):
    """DeepSpeed looks for experts only in a model that has a module of this class. It computes nothing."""

    def __init__(self, stage: PipelineStage, ep: int, name: str):
        nn.Module.__init__(self)
        self.ep_size, self.expert_group_name = ep, name
        self.num_experts = next(iter(stage.moe_layers.values())).config.num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups are there already."""

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a sign is not run")
