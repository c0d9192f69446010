"""The mixture of experts: routing, balance, dispatch, and the experts themselves."""

from pretrain.model.moe.mixture import MoE

__all__ = ["MoE"]
