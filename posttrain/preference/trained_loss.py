"""Losses of preferences as the trainer wants them: from each token's log-probability, weighed by the loss mask.

All sums over an answer are taken in fp64: an answer's log-probability is hundreds of nats, of which a difference of a
hundredth matters.
"""

import torch
from torch import Tensor

from configs.preference import PreferenceSection
from posttrain.preference.preference_examples import DESIRABLE
from posttrain.preference.preference_losses import Pairs, kto, pair_loss
from pretrain.model.batch import Batch

REFERENCE = "ref_logprobs"  # the name in `Batch.extra`


class PairPreference:
    """A loss of pairs whose sides are segments 2k and 2k + 1 of a row; each token's loss is that of its pair."""

    metrics: tuple[str, ...] = (
        *("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy"),
        *("logps/chosen", "logps/rejected"),
    )
    temperature = 1.0
    is_linear = False

    def __init__(self, section: PreferenceSection) -> None:
        self.section = section
        self.loss = pair_loss(section.loss, section.beta, section.smoothing, section.margin, section.sft_weight)

    def __call__(self, logprobs_BS: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss per token and the metrics per token, each [B, S]."""
        answers = _Answers(batch)
        policy, lengths = answers.sums(logprobs_BS), answers.sums(torch.ones_like(logprobs_BS)).clamp(min=1)
        reference = answers.sums(batch.extra[REFERENCE]) if self.section.has_reference else torch.zeros_like(policy)
        pairs = Pairs(*policy.unbind(1), *reference.unbind(1), *lengths.unbind(1))
        with torch.no_grad():
            # Without a reference the reward is beta times the log-probability per token, as in the loss.
            scale = 1.0 if self.section.has_reference else lengths
            rewards = self.section.beta * (policy - reference) / scale
            chosen, rejected = rewards.unbind(1)
            values = (chosen, rejected, chosen - rejected, (chosen > rejected).double(), pairs.chosen, pairs.rejected)
            found = {name: answers.spread(value) for name, value in zip(self.metrics, values, strict=True)}
        return answers.spread(self.loss(pairs)), found


class AnswerPreference:
    """KTO's loss of single answers, each a segment; `reference_point` is set before every step."""

    metrics: tuple[str, ...] = ("rewards/mean", "rewards/accuracy", "logps/mean", "kl")
    temperature = 1.0
    is_linear = False

    def __init__(self, section: PreferenceSection) -> None:
        self.section = section
        self.reference_point = 0.0

    def __call__(self, logprobs_BS: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss per token and the metrics per token, each [B, S]."""
        s, answers = self.section, _Answers(batch, of_pair=1)
        policy = answers.sums(logprobs_BS)[:, 0]
        logratio = policy - answers.sums(batch.extra[REFERENCE])[:, 0]
        desirable = answers.sums(batch.extra[DESIRABLE])[:, 0] > 0
        loss = kto(logratio, desirable, self.reference_point, s.beta, s.desirable_weight, s.undesirable_weight)
        with torch.no_grad():
            right = torch.where(desirable, logratio > self.reference_point, logratio < self.reference_point)
            kl = torch.full_like(policy, self.reference_point)
            values = (s.beta * logratio, right.double(), policy, kl)
            found = {name: answers.spread(value) for name, value in zip(self.metrics, values, strict=True)}
        return answers.spread(loss), found


class LogRatio:
    """Mean log-ratio of policy and reference over answers, as a metric; its loss is not trained on."""

    metrics: tuple[str, ...] = ("logratio",)
    temperature = 1.0
    is_linear = False

    def __call__(self, logprobs_BS: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        answers = _Answers(batch, of_pair=1)
        logratio = answers.spread(answers.sums(logprobs_BS - batch.extra[REFERENCE])[:, 0])
        return logratio, {"logratio": logratio}


class _Answers:
    """Sums over the trained tokens of each segment, in B * S groups of `of_pair` segments, one group a pair."""

    def __init__(self, batch: Batch, of_pair: int = 2) -> None:
        rows, length = batch.segments.shape
        first = torch.arange(rows, device=batch.segments.device)[:, None] * length
        segment = batch.segments.clamp(min=0)
        self.pair = first + segment // of_pair
        self.slot, self.of_pair = self.pair * of_pair + segment % of_pair, of_pair
        self.mask = batch.loss_mask > 0

    def sums(self, x_BS: Tensor) -> Tensor:
        """Returns the sum of `x_BS` over each segment's trained tokens, [B * S, of_pair] in fp64."""
        values = torch.where(self.mask, x_BS.double(), 0.0).flatten()
        nothing = values.new_zeros(values.numel() * self.of_pair)
        return nothing.index_add(0, self.slot.flatten(), values).view(-1, self.of_pair)

    def spread(self, of_pair: Tensor) -> Tensor:
        """Returns values [B, S] in fp32: at each trained token the value of its pair, elsewhere 0."""
        return torch.where(self.mask, of_pair[self.pair], 0.0).float()
