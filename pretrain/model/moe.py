"""A mixture of SwiGLU experts in place of an MLP: route, dispatch, compute, combine (Mixtral, DeepSeek).

Shared experts, if there are any, are one MLP that every token goes through. `router` chooses experts for a token,
`balance` keeps the choices even, and `dispatch` brings rows to `experts` and back.
"""

import torch
from torch import nn

from configs.model import ModelConfig
from pretrain.model.balance import Balance
from pretrain.model.dispatch import Dispatch
from pretrain.model.experts import Experts
from pretrain.model.layer_context import LayerContext
from pretrain.model.linear import Region
from pretrain.model.mlp import MLP
from pretrain.model.recompute import is_recomputing
from pretrain.model.router import Router


class MoE(nn.Module):
    """The mixture of experts of one block; takes and gives hidden states [S, B, H]."""

    def __init__(self, config: ModelConfig, context: LayerContext):
        super().__init__()
        moe, hidden_size = config.moe, config.hidden_size
        assert moe is not None
        self.config, self.region, self.ep_group = moe, Region(context), context.ep
        self.router = Router(hidden_size, moe, context)
        self.experts = Experts(moe.num_experts, hidden_size, config.expert_size, context)
        self.has_shared = moe.num_shared_experts > 0
        if self.has_shared:
            self.shared = MLP(hidden_size, moe.num_shared_experts * config.expert_size, context)
        self.balance = Balance(moe, context)

    def forward(self, x_SBH: torch.Tensor, valid_SB: torch.Tensor | None = None) -> torch.Tensor:
        shared = self.shared(x_SBH) if self.has_shared else 0.0
        x_SBH = self.region.gather(x_SBH)  # every rank routes all tokens, so balance is seen over whole sequences
        x_TH = x_SBH.flatten(0, 1)
        if valid_SB is None:
            valid_SB = torch.ones(x_SBH.shape[:2], dtype=torch.bool, device=x_SBH.device)
        weights_TK, experts_TK, logits_TE = self.router(x_TH, self.balance.choosing_bias)
        if self.training:
            x_TH = self.balance.attach(x_TH, logits_TE, experts_TK, valid_SB)
        x_TH, weights_TK = self._into_experts(x_TH, weights_TK)
        capacity = self.config.capacity_factor if self.training else None
        dispatch = Dispatch(experts_TK, self.config.num_experts, valid_SB.flatten(), capacity)
        if self.training and not is_recomputing():
            self.balance.dropped += (dispatch.wanted - dispatch.counts).sum()
        y_TH = dispatch.run(x_TH, weights_TK, self.experts, self.ep_group)
        return shared + self.region.leave(y_TH.view_as(x_SBH))

    def _into_experts(self, x_TH: torch.Tensor, weights_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Passes activations and weights to the experts; the backward pass sums the gradients over tp."""
        return self.region.copy(x_TH), self.region.copy(weights_TK)
