"""Chooses the experts of each token and their weights. Every rank holds the whole router and computes in fp32 or fp64.

Softmax gating is Switch's and Mixtral's; sigmoid gating, groups and the bias are DeepSeek-V2's and V3's (2024).
"""

import torch
import torch.nn.functional as F
from torch import nn

from configs.moe import MoEConfig
from pretrain.model.layer_context import LayerContext
from pretrain.model.slices import Marks, mark


class Router(nn.Module):
    """The router of one MoE layer."""

    def __init__(self, hidden_size: int, moe: MoEConfig, context: LayerContext):
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(
            torch.empty(moe.num_experts, hidden_size, dtype=context.dtype, device=context.device)
        )
        mark(self.weight, Marks())
        self.register_parameter("bias", None)
        if moe.router_bias:
            self.bias = nn.Parameter(torch.empty(moe.num_experts, dtype=context.dtype, device=context.device))
            mark(self.bias, Marks(constant=0.0, decays=False))

    def forward(
        self, x_TH: torch.Tensor, bias_E: torch.Tensor | None = None, replayed_TK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns weights [T, k], chosen experts [T, k] and logits [T, E]; the bias changes choices but no weights.

        Tokens go to the experts `replayed_TK`, if they are given; where those are -1 the router chooses.
        """
        precision = torch.promote_types(x_TH.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(precision)
        logits_TE = F.linear(x_TH.to(precision), self.weight.to(precision), bias)
        scores_TE = logits_TE.sigmoid() if self.moe.gating == "sigmoid" else logits_TE.softmax(-1)
        if bias_E is None and self.moe.num_groups == 1:
            experts_TK = self._choose(logits_TE.detach())  # scores grow with logits, and large ones are rounded to 1
        else:
            experts_TK = self._choose(scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E)
        if replayed_TK is not None:
            experts_TK = torch.where(replayed_TK < 0, experts_TK, replayed_TK)
        weights_TK = scores_TE.gather(1, experts_TK)
        if self.moe.renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-20)  # sigmoids may all be 0
        return weights_TK * self.moe.routed_scaling, experts_TK, logits_TE

    def _choose(self, scores_TE: torch.Tensor) -> torch.Tensor:
        moe = self.moe
        if moe.num_groups > 1:
            scores_TGE = scores_TE.unflatten(1, (moe.num_groups, -1))
            best = scores_TGE.topk(2 if moe.group_score == "top2" else 1, dim=-1).values.sum(-1)
            chosen_TG = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(moe.top_groups).indices, True)
            scores_TE = scores_TGE.masked_fill(~chosen_TG[..., None], float("-inf")).flatten(1)
        return scores_TE.topk(moe.top_k, dim=-1).indices
