"""The loss of the policy in training on the tokens of rollouts, in any dialect, with what surrounds it.

The dialect's loss is multiplied by the weights that correct for the sampler, and the divergence from the reference may
be added to it.
"""

from collections.abc import Callable

import torch

from configs.rl import RLSection
from posttrain.algorithms.kl import KLEstimator, kl_estimate, kl_penalty
from posttrain.algorithms.policy import TokenLoss
from posttrain.algorithms.rollout_correction import Correction, Level, rollout_weights
from posttrain.algorithms.token_batch import TokenBatch, sequences_of
from pretrain.model.batch import Batch

PTX = 1  # the source of rows of pretraining text; rollouts are source 0


class PolicyLoss:
    """The policy's loss per token, as a loss function for the trainer.

    Rows have `extra` arrays by the names in `TokenBatch`, and may have `factor`, which multiplies the loss and the
    metrics of their tokens: the share of a kind of rows in the whole.
    """

    is_linear = False

    def __init__(
        self,
        policy: Callable[[TokenBatch], TokenLoss],
        settings: RLSection,
        temperature: float,
        has_ptx: bool = False,
    ) -> None:
        self._policy, self._settings, self.temperature = policy, settings, temperature
        self._has_ptx = has_ptx
        charged = ("kl_reference",) if settings.kl == "loss" else ()
        weighed = ("correction_weight", "corrected") if settings.correction != "report" else ()
        self.metrics = ("logprob_difference", "kl_rollout", "clipped", *charged, *weighed, *(("ptx_loss",) * has_ptx))

    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss per token and the metrics per token, each [B, S]."""
        tokens = self._tokens(logprobs_BS, batch)
        loss_BS, clipped_BS = self._policy(tokens)
        found = self._measured(tokens, batch) | {"clipped": clipped_BS.float()}
        settings = self._settings
        if settings.correction != "report":
            weights = rollout_weights(
                tokens,
                Correction(settings.correction),
                Level(settings.correction_level),
                settings.correction_low,
                settings.correction_high,
            )
            loss_BS = loss_BS * weights.factor
            found |= {"correction_weight": weights.measured, "corrected": weights.out_of_bounds.float()}
        if settings.kl == "loss":
            kl_BS = kl_penalty(tokens, KLEstimator(settings.estimator))
            loss_BS = loss_BS + settings.kl_coef * torch.where(tokens.mask, kl_BS, 0.0)
            found["kl_reference"] = kl_BS.detach()
        if self._has_ptx:
            is_text = (batch.sources == PTX)[:, None]
            loss_BS = torch.where(is_text, -logprobs_BS, loss_BS)
            zero = torch.zeros_like(logprobs_BS)
            found = {name: torch.where(is_text, zero, value) for name, value in found.items()}
            found["ptx_loss"] = torch.where(is_text, -logprobs_BS.detach(), zero) * batch.extra["text_factor"]
        if "factor" in batch.extra:
            factor_BS, share_BS = batch.extra["factor"], batch.extra["share"]
            loss_BS = loss_BS * factor_BS
            found = {name: v if name == "ptx_loss" else v * share_BS for name, v in found.items()}
        return loss_BS, found

    def _tokens(self, logprobs_BS: torch.Tensor, batch: Batch) -> TokenBatch:
        extra = batch.extra
        old = extra.get("old_logprobs", extra["rollout_logprobs"])
        return TokenBatch(
            logprobs_BS,
            mask=batch.loss_mask > 0,
            sequences=sequences_of(batch.segments),
            old_logprobs=old,
            rollout_logprobs=extra["rollout_logprobs"],
            ref_logprobs=extra.get("ref_logprobs"),
            advantages=extra["advantages"],
        )

    @torch.no_grad()
    def _measured(self, tokens: TokenBatch, batch: Batch) -> dict[str, torch.Tensor]:
        old_BS = torch.where(tokens.mask, tokens.need("old_logprobs"), 0.0)
        sampled_BS = torch.where(tokens.mask, tokens.need("rollout_logprobs"), 0.0)
        before_BS = old_BS if "old_logprobs" in batch.extra else tokens.logprobs
        return {
            "logprob_difference": (before_BS - sampled_BS).abs(),
            "kl_rollout": kl_estimate(old_BS, tokens.logprobs, KLEstimator.K3),
        }
