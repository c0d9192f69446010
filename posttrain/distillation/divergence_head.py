"""The output heads of student and teacher and the divergence between them in one, chunk by chunk.

The logits of a whole micro-batch never exist, neither the student's nor the teacher's: of the teacher there are the
final hidden states of the trained tokens, and its head. The divergence is linear in its tokens, so one pass computes
values and gradients, as `pretrain.model.head_loss` does for next tokens; the backward pass hands out what was computed.

With a vocabulary split over tensor-parallel ranks, student and teacher are split alike, and a chunk takes three small
all-reduces: of maxima, of sums, and of parts of the divergence.

N trained tokens, n those of a chunk, H hidden size, V vocabulary, of which a rank holds a part.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from posttrain.distillation.divergences import Kind, terms
from pretrain.model.batch import Batch
from pretrain.model.head_loss import HeadLoss, WithGradients, tokens_of_chunk
from pretrain.model.losses import LossFunction
from pretrain.model.products import add_product

NEVER = -1e30  # the logit of padding: its probability is 0, and differences of two such logits are no NaN
MEASURED = 4  # values of a token: divergence, log-probabilities of the label by student and teacher, agreement


@dataclass(frozen=True)
class Head:
    """The rows of an output head that this rank holds, [V, H]; logits become c * tanh(logit / c) with a softcap c."""

    weight: torch.Tensor
    softcap: float | None = None

    def logits(self, x_nH: torch.Tensor, rows: int, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the logits of the first `rows` rows [n, rows], and with a softcap the derivative of its tanh."""
        logits_nV = (x_nH @ self.weight[:rows].t()).to(wide)
        if self.softcap is None:
            return logits_nV, None
        tanh_nV = torch.tanh_(logits_nV.div_(self.softcap))
        return tanh_nV * self.softcap, 1 - tanh_nV.square()


@dataclass(frozen=True)
class TeacherStates:
    """The teacher's final hidden states [N, H] at the trained tokens of a micro-batch, and its head."""

    x: torch.Tensor
    head: Head


@dataclass(frozen=True)
class Settings:
    """The divergence that is learnt; `vocab_size` is the number of tokens that both models have."""

    kind: Kind
    beta: float
    temperature: float
    vocab_size: int


class OfDistributions(LossFunction, Protocol):
    """A loss of whole distributions; on the last stage `states` has the teacher's hidden states on a micro-batch."""

    settings: Settings

    def states(self, batch: Batch, /) -> TeacherStates: ...


class DivergenceHead(HeadLoss):
    """The loss of one micro-batch, called once with the student's final hidden states, like `HeadLoss`.

    Its loss function gets the values [B, S, 4] that `_Chunks.measured` returns.
    """

    loss_fn: "OfDistributions"

    def __call__(
        self,
        x_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        vocab_size: int,
        group: ProcessGroup | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Computes the scaled loss; the gradient of `x_NH` under tensor parallel is this rank's part of it."""
        batch, student = self.batch, Head(weight_VH.detach(), softcap)
        labels_N, weights_N = (t.flatten().index_select(0, batch.trained) for t in (batch.labels, batch.loss_mask))
        wide = torch.promote_types(x_NH.dtype, torch.float32)
        slope_N = weights_N.to(wide) * self.scale if torch.is_grad_enabled() else None
        teacher = self.loss_fn.states(batch)
        chunks = _Chunks(x_NH.detach(), student, teacher, labels_N, self.loss_fn.settings, group)
        loss, self.sums = self._loss(chunks.measured(slope_N))
        if slope_N is None:
            return loss
        return WithGradients.apply(loss.detach(), x_NH, weight_VH, chunks.grad_x, chunks.grad_weight)


class _Chunks:
    """The products of both heads over chunks of hidden states. Nothing here is seen by autograd."""

    grad_x: torch.Tensor  # [N, H], this rank's part
    grad_weight: torch.Tensor  # [V, H]

    def __init__(
        self,
        x_NH: torch.Tensor,
        student: Head,
        teacher: TeacherStates,
        labels_N: torch.Tensor,
        settings: Settings,
        group: ProcessGroup | None,
    ) -> None:
        self.x, self.student, self.teacher, self.settings = x_NH, student, teacher, settings
        self.group = group if group is not None and group.size() > 1 else None
        # Heads of two sizes, which are padded otherwise, have their common rows compared; split ones have one size.
        self.rows = min(len(student.weight), len(teacher.head.weight))
        first = self.rows * self.group.rank() if self.group else 0  # token of this rank's first row
        self.labels, self.own_vocab = labels_N - first, min(self.rows, max(0, settings.vocab_size - first))
        self.wide = torch.promote_types(x_NH.dtype, torch.float32)
        self.tokens = tokens_of_chunk(x_NH, self.rows)

    @torch.no_grad()
    def measured(self, slope_N: torch.Tensor | None) -> torch.Tensor:
        """Returns, of each token, divergence, log-probabilities of the label by student and teacher, and agreement.

        Agreement is 1 where both have the same likeliest token. The result is [N, 4]; with the loss's slope by each
        divergence it computes the gradients too.
        """
        found = self.x.new_zeros(len(self.x), MEASURED, dtype=self.wide)
        if slope_N is not None:
            self.grad_x = torch.empty_like(self.x)
            total = torch.zeros(self.student.weight.shape, dtype=self.wide, device=self.x.device)
        for start in range(0, len(self.x), self.tokens):
            part = slice(start, start + self.tokens)
            found[part], grad_nV = self._chunk(part, None if slope_N is None else slope_N[part])
            if grad_nV is not None:
                self.grad_x[part] = grad_nV @ self.student.weight[: self.rows]
                add_product(total[: self.rows], grad_nV.t(), self.x[part])
        if slope_N is not None:
            self.grad_weight = total.to(self.student.weight.dtype)
        return found

    def _chunk(self, part: slice, slope_n: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the values of a chunk's tokens [n, 4], and with a slope the gradient by the student's logits."""
        own, settings, rows = self.own_vocab, self.settings, self.rows
        logits_nV, bent_nV = self.student.logits(self.x[part], rows, self.wide)
        logq_nV = self._prepared(logits_nV)
        logp_nV = self._prepared(self.teacher.head.logits(self.teacher.x[part], rows, self.wide)[0])
        greatest_2n = self._summed(torch.stack((logq_nV.amax(1), logp_nV.amax(1))), dist.ReduceOp.MAX)
        logq_nV.sub_(greatest_2n[0][:, None])
        logp_nV.sub_(greatest_2n[1][:, None])
        same_n = ((logq_nV[:, :own] == 0) & (logp_nV[:, :own] == 0)).any(1)
        label_n = self.labels[part]
        is_here_n, index_n1 = (label_n >= 0) & (label_n < rows), label_n.clamp(0, rows - 1)[:, None]
        of_label = [t.gather(1, index_n1)[:, 0].where(is_here_n, 0.0) for t in (logq_nV, logp_nV)]
        sums = self._summed(torch.stack((logq_nV.exp().sum(1), logp_nV.exp().sum(1), *of_label, same_n.to(self.wide))))
        logs_2n = sums[:2].log()
        logq_nV.sub_(logs_2n[0][:, None])
        logp_nV.sub_(logs_2n[1][:, None])
        summands_nV, slopes_nV = terms(logq_nV, logp_nV, settings.kind, settings.beta)
        totals_2n = self._summed(torch.stack((summands_nV.sum(1), slopes_nV.sum(1))))
        values_n4 = torch.stack((totals_2n[0], sums[2] - logs_2n[0], sums[3] - logs_2n[1], sums[4].clamp(max=1)), 1)
        if slope_n is None:
            return values_n4, None
        grad_nV = slopes_nV - logq_nV.exp_() * totals_2n[1][:, None]
        grad_nV.mul_((slope_n / settings.temperature)[:, None])
        if bent_nV is not None:
            grad_nV.mul_(bent_nV)
        return values_n4, grad_nV.to(self.student.weight.dtype)

    def _prepared(self, logits_nV: torch.Tensor) -> torch.Tensor:
        logits_nV = logits_nV / self.settings.temperature
        logits_nV[:, self.own_vocab :] = NEVER
        return logits_nV

    def _summed(self, values: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        if self.group:
            dist.all_reduce(values, op, group=self.group)
        return values
