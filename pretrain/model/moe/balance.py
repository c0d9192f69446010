"""Balances the use of experts by auxiliary losses on the router and by a bias on its choices, and counts the choices.

The load-balancing loss is Switch's (Fedus et al. 2021, eq. 4): E/k · Σ_e f_e P_e, with f_e the share of tokens that
chose expert e and P_e the mean of its probabilities. `aux_loss` chooses what f and P are computed over: each sequence,
each micro-batch, or the global batch (Qiu et al. 2025). Gradients flow through P alone, so f may come from elsewhere:
for the global batch it comes from the step before. The f of the step itself is known only after the forward pass of
the last micro-batch, and a pipeline has begun with backward passes long before. All three are sums over tokens with
weights fixed beforehand, so no layout changes them.

The z-loss is the mean over tokens of logsumexp(logits)² (Zoph et al. 2022). The bias is DeepSeek-V3's (2024, eq. 16):
after each step it goes up by a fixed rate for experts with fewer tokens than the mean and down for those with more.

Losses enter the backward pass through `AttachLoss`, since a pipeline stage has no loss of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from configs.moe import MoEConfig
from pretrain.model.layer_context import LayerContext
from pretrain.model.layers import is_recomputing


class AttachLoss(torch.autograd.Function):
    """Returns `x` unchanged; in the backward pass `loss` gets gradient one, as if it were a term of the final loss."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, torch.ones_like(ctx.saved_tensors[0])


@dataclass(frozen=True)
class LossDenominators:
    """The numbers that this step's losses are divided by: sequences and tokens of the global batch, without padding.

    `scale` is the factor by which the engine multiplies all its losses.
    """

    sequences: int
    tokens: int
    scale: float


class Balance(nn.Module):
    """The balancing of one MoE layer. Its state, `bias` and `load`, is saved with the weights; no optimizer changes it.

    `load` [E] holds the shares f of the last global batch, `tokens` [E] counts how often this one chose each expert.
    """

    bias: torch.Tensor
    load: torch.Tensor
    tokens: torch.Tensor
    dropped: torch.Tensor
    aux_loss: torch.Tensor

    def __init__(self, moe: MoEConfig, context: LayerContext):
        super().__init__()
        self.moe, self._group, self._cp = moe, context.cp, context.cp_size
        experts, device = moe.num_experts, context.device
        self.register_buffer("bias", torch.zeros(experts, device=device))
        self.register_buffer("load", torch.full((experts,), moe.top_k / experts, device=device))
        for name, shape, dtype in (
            ("tokens", (experts,), torch.int64),
            ("dropped", (), torch.int64),
            ("aux_loss", (), torch.float64),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.denominators: LossDenominators | None = None  # set by the engine before each step

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Balance":
        """Moves the buffers with the model but keeps their precision: a bias in bf16 would lose its small updates."""
        before = {name: buffer for name, buffer in self.named_buffers(recurse=False)}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if getattr(self, name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def start(self) -> None:
        """Sets all counts to zero before a step."""
        for count in (self.tokens, self.dropped, self.aux_loss):
            count.zero_()

    @property
    def choosing_bias(self) -> torch.Tensor | None:
        return self.bias if self.moe.bias_update_rate else None

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors that last from step to step, by name, if the config uses them; a checkpoint fills them in place."""
        return {name: getattr(self, name) for name in self.moe.state()}

    def attach(
        self, x_TH: torch.Tensor, logits_TE: torch.Tensor, experts_TK: torch.Tensor, valid_SB: torch.Tensor
    ) -> torch.Tensor:
        """Adds the losses of this micro-batch to the backward pass of `x_TH`, and counts the experts' tokens."""
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
        """Computes this rank's part of the loss, a mean over the global batch."""
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
        """Sums over whole sequences, also where a rank holds a part of each (context parallel). No gradient flows."""
        total = x_SBX.detach().sum(0)
        if self._cp > 1:
            dist.all_reduce(total, group=self._group)
        return total

    def finish(self, tokens_E: torch.Tensor, changes: torch.Tensor) -> None:
        """Updates `load` and `bias` after a step whose global batch chose each expert `tokens_E` times.

        They stay as they are where `changes`, a boolean on the device, is false.
        """
        share = tokens_E.double() / tokens_E.sum().clamp(min=1)
        self.load.copy_(torch.where(changes, share * self.moe.top_k, self.load))
        if self.moe.bias_update_rate:
            self.bias += self.moe.bias_update_rate * torch.sign(share.mean() - share).float() * changes


def _probabilities(logits_SBE: torch.Tensor, moe: MoEConfig) -> torch.Tensor:
    """Computes each token's router scores as shares of one, which the balance loss uses."""
    if moe.gating == "softmax":
        return logits_SBE.softmax(-1)
    scores = logits_SBE.sigmoid()
    return scores / scores.sum(-1, keepdim=True)
