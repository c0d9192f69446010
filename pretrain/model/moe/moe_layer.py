"""A mixture of experts in place of an MLP: route, dispatch, compute, combine (Mixtral, DeepSeek).

Shared experts, if there are any, are one MLP that every token goes through. `router` chooses experts for a token,
`balance` keeps the choices even, and `dispatch` brings rows to `experts` and back.
"""

import torch
from torch import nn

from configs.model import LayerConfig
from pretrain.model.layer_context import LayerContext
from pretrain.model.layers import MLP, is_recomputing
from pretrain.model.moe.balance import Balance
from pretrain.model.moe.dispatch import Dispatch
from pretrain.model.moe.experts import Experts
from pretrain.model.moe.router import Router
from pretrain.model.tensor_parallel import Region, WholeLinear


class MoE(nn.Module):
    """The mixture of experts of one block; takes and gives hidden states [S, B, H]."""

    def __init__(self, config: LayerConfig, context: LayerContext):
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.config, self.region, self.ep_group = moe, Region(context), context.ep
        self.router = Router(config.hidden_size, moe, context)
        self.experts = Experts(config, context)
        self.has_shared = moe.num_shared_experts > 0
        if self.has_shared:
            self.shared = MLP(config, config.shared_size, context)
        if moe.shared_gate:
            self.shared_gate = WholeLinear(config.hidden_size, 1, context)
        self.balance = Balance(moe, context)

    def forward(
        self, x_SBH: torch.Tensor, valid_SB: torch.Tensor | None = None, replayed_SBK: torch.Tensor | None = None
    ) -> torch.Tensor:
        shared = self._shared(x_SBH) if self.has_shared else 0.0
        x_SBH = self.region.gather(x_SBH)  # every rank routes all tokens, so balance is seen over whole sequences
        x_TH = x_SBH.flatten(0, 1)
        if valid_SB is None:
            valid_SB = torch.ones(x_SBH.shape[:2], dtype=torch.bool, device=x_SBH.device)
        replayed_TK = None if replayed_SBK is None else replayed_SBK.flatten(0, 1)
        weights_TK, experts_TK, logits_TE = self.router(x_TH, self.balance.choosing_bias, replayed_TK)
        if self.training:
            x_TH = self.balance.attach(x_TH, logits_TE, experts_TK, valid_SB)
        x_TH, weights_TK = self._into_experts(x_TH, weights_TK)
        if self.config.weigh == "input":
            x_TH, weights_TK = x_TH * weights_TK.to(x_TH.dtype), torch.ones_like(weights_TK)
        capacity = self.config.capacity_factor if self.training else None
        dispatch = Dispatch(experts_TK, self.config.num_experts, valid_SB.flatten(), capacity)
        if self.training and not is_recomputing():
            self.balance.dropped += (dispatch.wanted - dispatch.counts).sum()
        y_TH = dispatch.run(x_TH, weights_TK, self.experts, self.ep_group)
        return shared + self.region.leave(y_TH.view_as(x_SBH))

    def _shared(self, x_SBH: torch.Tensor) -> torch.Tensor:
        y_SBH = self.shared(x_SBH)
        return y_SBH * self.shared_gate(x_SBH).sigmoid() if self.config.shared_gate else y_SBH

    def _into_experts(self, x_TH: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Passes activations and weights to the experts; the backward pass sums the gradients over tp."""
        return self.region.copy(x_TH), self.region.copy(weights_TK)
