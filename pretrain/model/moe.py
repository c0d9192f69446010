"""A mixture of SwiGLU experts: softmax router, top-k, dropless (Mixtral: Jiang et al. 2024).

Every expert is split over tensor-parallel ranks like a dense MLP. The router is whole on each rank, in fp32. The
load-balancing loss is Switch's (Fedus et al. 2021, eq. 4) taken per sequence, so that it does not depend on how
sequences are grouped into micro-batches: for a sequence of T tokens, E/k · Σ_e (tokens to e / T) · (mean prob of e).
It enters the backward pass through `attach_loss`, since a pipeline stage has no loss of its own.

Left out: expert parallel, capacity limits, shared experts, sigmoid gating, z-loss.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from configs.train import ModelConfig, MoEConfig
from pretrain.model.linear import Region
from pretrain.model.megatron import ModelParallelConfig, tensor_parallel


class AttachLoss(torch.autograd.Function):
    """Identity on `x`; in backward, `loss` gets gradient one, as if it had been added to the final loss."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, torch.ones_like(ctx.saved_tensors[0])


class Router(nn.Module):
    """Chooses `top_k` of `num_experts` for each token; weights are their softmax probabilities, summing to one."""

    def __init__(self, hidden_size: int, moe: MoEConfig, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.top_k = moe.top_k
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_size, dtype=dtype, device=device))

    def forward(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights [T, k], chosen experts [T, k], all probabilities [T, E]."""
        probs_TE = F.linear(x_TH.float(), self.weight.float()).softmax(-1)
        weights_TK, experts_TK = probs_TE.topk(self.top_k, dim=-1)
        return weights_TK / weights_TK.sum(-1, keepdim=True), experts_TK, probs_TE


class Experts(nn.Module):
    """E SwiGLU MLPs as stacked weights; under tensor parallel each has its share of F and gives a partial sum."""

    def __init__(self, config: ModelConfig, moe: MoEConfig, tp: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        experts, hidden, ffn = moe.num_experts, config.hidden_size, config.ffn_hidden_size // tp
        self.gate_proj = nn.Parameter(torch.empty(experts, ffn, hidden, dtype=dtype, device=device))
        self.up_proj = nn.Parameter(torch.empty(experts, ffn, hidden, dtype=dtype, device=device))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, ffn, dtype=dtype, device=device))
        for weight, dim in ((self.gate_proj, 1), (self.up_proj, 1), (self.down_proj, 2)):
            tensor_parallel.set_tensor_model_parallel_attributes(weight, tp > 1, dim, 1)

    def forward(self, x_TH: torch.Tensor, tokens_per_expert: list[int]) -> torch.Tensor:
        """`x_TH` is sorted by expert; the first `tokens_per_expert[0]` rows belong to expert 0, and so on."""
        outputs = []
        for expert, x in enumerate(x_TH.split(tokens_per_expert)):
            hidden = F.silu(F.linear(x, self.gate_proj[expert])) * F.linear(x, self.up_proj[expert])
            outputs.append(F.linear(hidden, self.down_proj[expert]))
        return torch.cat(outputs)


class MoE(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        layer_config: ModelParallelConfig,
        tp_group: ProcessGroup | None,
        device: torch.device,
    ):
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.aux_loss_coef, self.region = moe.aux_loss_coef, Region(layer_config, tp_group)
        self.router = Router(config.hidden_size, moe, layer_config.params_dtype, device)
        self.experts = Experts(config, moe, self.region.tp, layer_config.params_dtype, device)
        # Set by the engine for each step: what one sequence's auxiliary loss weighs in the global batch's loss.
        self.sequence_weight = 0.0
        self.stats = MoEStats()

    def forward(self, x_SBH: torch.Tensor, valid_SB: torch.Tensor | None = None) -> torch.Tensor:
        x_SBH = self.region.gather(x_SBH)  # every rank routes all tokens, so balance is seen over whole sequences
        x_TH = x_SBH.flatten(0, 1)
        weights_TK, experts_TK, probs_TE = self.router(x_TH)
        if self.training:
            x_TH = self._balance(x_TH, probs_TE, experts_TK, valid_SB, x_SBH.shape[1])
        # Each rank's experts see only their share of F: gradients of what goes in are partial, and summed here.
        x_TH, weights_TK = self.region.copy(x_TH), self.region.copy(weights_TK)

        top_k = experts_TK.shape[1]
        order = experts_TK.flatten().argsort(stable=True)  # (token, choice) pairs, sorted by expert
        counts = torch.bincount(experts_TK.flatten(), minlength=probs_TE.shape[1])
        y = self.experts(x_TH[order // top_k], counts.tolist())
        y = y * weights_TK.flatten()[order, None].to(y.dtype)
        # Undo the sort, then sum a token's k rows: a fixed order of addition, unlike index_add on a GPU.
        y_TH = torch.empty_like(y).index_copy(0, order, y).unflatten(0, (-1, top_k)).sum(1)
        return self.region.leave(y_TH.view_as(x_SBH))

    def _balance(
        self,
        x_TH: torch.Tensor,
        probs_TE: torch.Tensor,
        experts_TK: torch.Tensor,
        valid_SB: torch.Tensor | None,
        batch: int,
    ) -> torch.Tensor:
        num_experts, top_k = probs_TE.shape[1], experts_TK.shape[1]
        chosen_TE = torch.zeros_like(probs_TE).scatter_(1, experts_TK, 1.0)
        probs_SBE, chosen_SBE = probs_TE.unflatten(0, (-1, batch)), chosen_TE.unflatten(0, (-1, batch))
        if valid_SB is None:
            valid_SB = probs_SBE.new_ones(probs_SBE.shape[:2])
        valid = valid_SB.to(probs_SBE.dtype)[..., None]
        tokens_B1 = valid.sum(0).clamp(min=1)
        share_BE = (chosen_SBE * valid).sum(0) / tokens_B1
        mean_prob_BE = (probs_SBE * valid).sum(0) / tokens_B1
        aux_loss_B = num_experts / top_k * (share_BE * mean_prob_BE).sum(-1)
        self.stats.add(aux_loss_B.detach(), (chosen_SBE * valid).sum((0, 1)).detach())
        weight = self.aux_loss_coef * self.sequence_weight
        return AttachLoss.apply(x_TH, aux_loss_B.sum() * weight) if weight else x_TH


class MoEStats:
    """Sums over the micro-batches of a step, for the log: the auxiliary loss and how many tokens each expert got.

    A block that is recomputed adds its micro-batch twice, to all three: only their ratios mean anything.
    """

    def __init__(self) -> None:
        self.aux_loss: torch.Tensor | float = 0.0
        self.sequences = 0
        self.tokens_per_expert: torch.Tensor | float = 0.0

    def add(self, aux_loss_B: torch.Tensor, tokens_E: torch.Tensor) -> None:
        self.aux_loss = self.aux_loss + aux_loss_B.sum()
        self.sequences += aux_loss_B.shape[0]
        self.tokens_per_expert = self.tokens_per_expert + tokens_E
