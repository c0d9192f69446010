"""What keeps experts evenly used: auxiliary losses on the router, a bias on its choices, and the count of both.

The load-balancing loss is Switch's (Fedus et al. 2021, eq. 4): E/k · Σ_e f_e P_e, with f_e the share of tokens that
chose expert e and P_e the mean of its probabilities. What it is taken over is a choice: each sequence, each
micro-batch, or the global batch (Qiu et al. 2025). Gradients flow through P alone, so f may be known from elsewhere:
for the global batch it is that of the step before, since its own is not known before the last micro-batch's forward
pass, when a pipeline has long begun with backward passes. All three are sums over tokens with weights fixed
beforehand, so no layout changes them.

The z-loss is the mean over tokens of logsumexp(logits)² (Zoph et al. 2022). The bias is DeepSeek-V3's (2024, eq. 16):
after each step it goes up by a fixed rate for experts with fewer tokens than the mean and down for those with more.

Losses enter the backward pass through `AttachLoss`, since a pipeline stage has no loss of its own.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from configs.train import MoEConfig
from pretrain.model.layer_context import LayerContext
from pretrain.model.recompute import is_recomputing


class AttachLoss(torch.autograd.Function):
    """Identity on `x`; in backward, `loss` gets gradient one, as if it had been added to the final loss."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, torch.ones_like(ctx.saved_tensors[0])


@dataclass(frozen=True)
class LossDenominators:
    """What this step's losses are divided by: sequences and tokens of the global batch, padding not counted.

    `scale` is what the engine multiplies all its losses by.
    """

    sequences: int
    tokens: int
    scale: float


class Balance:
    """Of one layer. Its state, `bias` and `load`, is part of the weights; it belongs to no optimizer.

    `load` [E] holds the shares f of the last global batch, `tokens` [E] counts this one's choices.
    """

    def __init__(self, moe: MoEConfig, context: LayerContext):
        self.moe, self._group, self._cp = moe, context.cp, context.cp_size
        self.bias = torch.zeros(moe.num_experts, device=context.device)
        self.load = torch.full((moe.num_experts,), moe.top_k / moe.num_experts, device=context.device)
        self.denominators: LossDenominators | None = None  # set by the engine before each step
        self.start()

    def start(self) -> None:
        """Forgets the last step's counts."""
        self.tokens = torch.zeros(self.moe.num_experts, dtype=torch.int64, device=self.bias.device)
        self.dropped = torch.zeros((), dtype=torch.int64, device=self.bias.device)
        self.aux_loss = torch.zeros((), dtype=torch.float64, device=self.bias.device)

    @property
    def choosing_bias(self) -> torch.Tensor | None:
        return self.bias if self.moe.bias_update_rate else None

    def state(self) -> dict[str, torch.Tensor]:
        """What outlives a step, as far as it is used; to be filled in place."""
        return {name: getattr(self, name) for name in self.moe.state()}

    def attach(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, experts_TK: torch.Tensor, valid_SB: torch.Tensor
    ) -> torch.Tensor:
        """Adds this micro-batch's losses to the backward pass of `x_TH`, and counts."""
        moe, denominators = self.moe, self.denominators
        chosen_TE = torch.zeros_like(logits_TE).scatter_(1, experts_TK, 1.0)
        batch = valid_SB.shape[1]
        valid = valid_SB.to(logits_TE.dtype)[..., None]
        logits_SBE = logits_TE.unflatten(0, (-1, batch))
        chosen_SBE = chosen_TE.unflatten(0, (-1, batch)) * valid
        if not is_recomputing():
            self.tokens += chosen_SBE.detach().sum((0, 1)).long()
        if denominators is None:
            return x_TH
        aux_loss = self._aux_loss(_probabilities(logits_SBE, moe) * valid, chosen_SBE, valid, denominators)
        if not is_recomputing():
            self.aux_loss += aux_loss.detach()
        loss = moe.aux_loss_coef * aux_loss
        if moe.z_loss_coef:
            z_loss = (logits_SBE.logsumexp(-1).square() * valid[..., 0]).sum() / denominators.tokens
            loss = loss + moe.z_loss_coef * z_loss
        return AttachLoss.apply(x_TH, loss * denominators.scale)

    def _aux_loss(
        self, probs_SBE: torch.Tensor, chosen_SBE: torch.Tensor, valid: torch.Tensor, denominators: LossDenominators
    ) -> torch.Tensor:
        """This rank's part of the mean over the global batch."""
        moe = self.moe
        factor = moe.num_experts / moe.top_k
        if moe.aux_loss == "global_batch":
            return factor * (self.load * probs_SBE.sum((0, 1))).sum() / denominators.tokens
        counts = self._over_context(torch.cat((chosen_SBE, valid), dim=-1))
        chosen_BE, tokens_B1, probs_BE = counts[:, :-1], counts[:, -1:], probs_SBE.sum(0)
        batch = len(chosen_BE)
        if moe.aux_loss == "micro_batch":
            chosen_BE, tokens_B1, probs_BE = (x.sum(0, keepdim=True) for x in (chosen_BE, tokens_B1, probs_BE))
        tokens_B1 = tokens_B1.clamp(min=1)
        losses = factor * (chosen_BE / tokens_B1 * probs_BE / tokens_B1).sum(-1)
        return losses.sum() * (batch / len(losses)) / denominators.sequences

    def _over_context(self, x_SBX: torch.Tensor) -> torch.Tensor:
        """Sums over whole sequences, of which this rank may have a part. No gradient flows."""
        total = x_SBX.detach().sum(0)
        if self._cp > 1:
            dist.all_reduce(total, group=self._group)
        return total

    def finish(self, tokens_E: torch.Tensor) -> None:
        """After a step in which the global batch's tokens chose experts `tokens_E` times."""
        share = tokens_E.double() / tokens_E.sum().clamp(min=1)
        self.load.copy_(share * self.moe.top_k)
        if self.moe.bias_update_rate:
            self.bias += self.moe.bias_update_rate * torch.sign(share.mean() - share).float()


def _probabilities(logits_SBE: torch.Tensor, moe: MoEConfig) -> torch.Tensor:
    """What the balance loss sees: each token's scores, as shares of one."""
    if moe.gating == "softmax":
        return logits_SBE.softmax(-1)
    scores = logits_SBE.sigmoid()
    return scores / scores.sum(-1, keepdim=True)
