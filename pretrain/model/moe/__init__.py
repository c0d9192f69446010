"""The mixture of experts: routing, balance, dispatch, and the experts themselves."""

from pretrain.model.moe.moe_layer import MoE

__all__ = ["MoE"]
