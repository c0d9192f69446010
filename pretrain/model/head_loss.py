"""The output head and the loss in one, chunk by chunk, so that the logits of a whole micro-batch never exist.

A chunk's logits are computed, turned into log-probabilities of the labels and into the gradients of the hidden states
and of the head, and dropped. For that the derivative of the loss by every log-probability must be known. It is known
beforehand where the loss is linear in them, as the cross entropy of next tokens is: one pass does it all (as in Liger
Kernel, Hsu et al. 2024). Any other loss takes a first pass for the log-probabilities and a second one that computes
the logits again. Both happen in the forward pass; the backward pass hands out what was computed.

With a vocabulary split over tensor-parallel ranks a chunk takes two small all-reduces, of maxima and of sums.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from pretrain.megatron import get_pg_size
from pretrain.model.batch import Batch
from pretrain.model.cache_parts import in_parts
from pretrain.model.losses import LossFunction, NextToken
from pretrain.model.products import add_product, multiply

# Number of logits in a chunk: on a CPU some megabytes, which its caches hold, and on a GPU enough to keep it busy.
CHUNK_CPU, CHUNK_GPU = 2**21, 2**26
# In bf16 each chunk's product for the head's gradient is added to the sum in fp32, a pass over all of it. On a CPU a
# chunk therefore has as many tokens as hidden states have elements, up to so many logits.
LARGEST_CHUNK_CPU = 2**24
# Rows of logits are so many elements longer in memory than the vocabulary. Rows at multiples of a large power of two
# fall into the same few sets of a CPU's cache: with a vocabulary of 8,192 the product took 1.3 times as long.
APART = 16
LEAST_TOKENS = 64  # of a chunk; matrix products of fewer rows are slow

LossOfLogprobs = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # logprobs [N] to (loss, sums)


class HeadLoss:
    """The loss of one micro-batch, called once with the final hidden states. `sums` are there after the call.

    Of a scalar head `of_values` takes the values. They are few, so that autograd computes its gradients.

    `sums` holds the masked loss per source, the mask's weight per source and the masked sum of each metric. `scale`
    multiplies the loss that is returned, for the backward pass. `modules` are the losses of multi-token prediction,
    each with its part `of_modules` of the scale.
    """

    sums: torch.Tensor
    modules: Sequence["HeadLoss"] = ()

    def __init__(self, batch: Batch, loss_fn: LossFunction, scale: float, num_sources: int, of_modules: float = 0.0):
        self.batch, self.loss_fn, self.scale, self.num_sources = batch, loss_fn, scale, num_sources
        self.modules = [
            HeadLoss(batch.of_module(i), NextToken(), scale * of_modules, num_sources) for i in range(len(batch.ahead))
        ]

    @property
    def all_sums(self) -> torch.Tensor:
        """The sums, and after them the masked loss of each module of multi-token prediction."""
        return torch.cat([self.sums, *(own.sums[: self.num_sources].sum().view(1) for own in self.modules)])

    def __call__(
        self,
        x_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        vocab_size: int,
        group: ProcessGroup | None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Computes the scaled loss from the hidden states at `batch.trained` and this rank's rows of the head.

        Under tensor parallel the gradient of `x_NH` is this rank's part of it. Rows past `vocab_size` are padding.
        With a `softcap` c logits become c * tanh(logit / c).
        """
        labels_N = self.batch.labels.flatten().index_select(0, self.batch.trained)
        head = _Head(x_NH.detach(), weight_VH.detach(), labels_N, self.loss_fn.temperature, vocab_size, group, softcap)
        if not torch.is_grad_enabled():
            loss, self.sums = self._loss(head.logprobs())
            return loss
        if self.loss_fn.is_linear:
            slope_N, *_ = self._slope(torch.zeros(len(x_NH), dtype=head.wide, device=x_NH.device))
            loss, self.sums = self._loss(head.logprobs(slope_N))
        else:
            slope_N, loss, self.sums = self._slope(head.logprobs())
            head.logprobs(slope_N)
        return WithGradients.apply(loss.detach(), x_NH, weight_VH, head.grad_x, head.grad_weight)

    def of_values(self, values_NK: torch.Tensor) -> torch.Tensor:
        """Computes the scaled loss from a scalar head's values at `batch.trained`.

        The loss function gets values [B, S, K], or [B, S] where K is one.
        """
        loss, self.sums = self._loss(values_NK[:, 0] if values_NK.shape[1] == 1 else values_NK)
        return loss

    def _slope(self, logprobs_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns the derivative of the scaled loss by each log-probability, the scaled loss, and the sums."""
        with torch.enable_grad():
            logprobs_N = logprobs_N.requires_grad_()
            loss, sums = self._loss(logprobs_N)
        (slope_N,) = torch.autograd.grad(loss, logprobs_N)
        return slope_N, loss.detach(), sums

    def _loss(self, of_trained: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the loss and the sums from log-probabilities [N] or values [N, K] at `batch.trained`."""
        batch, loss_fn = self.batch, self.loss_fn
        nowhere = of_trained.new_zeros(batch.labels.numel(), *of_trained.shape[1:])
        outputs = nowhere.index_copy(0, batch.trained, of_trained).unflatten(0, batch.labels.shape)
        loss_BS, metrics = loss_fn(outputs, batch)
        loss_B = (loss_BS * batch.loss_mask).sum(1)
        with torch.no_grad():
            per_source = torch.zeros(2, self.num_sources, dtype=torch.float64, device=loss_B.device)
            per_source[0].index_add_(0, batch.sources, loss_B.detach().double())
            per_source[1].index_add_(0, batch.sources, batch.loss_mask.sum(1, dtype=torch.float64))
            named = [(metrics[name] * batch.loss_mask).sum(dtype=torch.float64) for name in loss_fn.metrics]
            sums = torch.cat([per_source.flatten(), *(value.view(1) for value in named)])
        return loss_B.sum() * self.scale, sums


def head_loss(batch: Batch, loss_fn: LossFunction, scale: float, num_sources: int, of_modules: float = 0.0) -> HeadLoss:
    """Returns the loss of a micro-batch: a `HeadLoss`, or the kind that the loss function makes by its `head_loss`."""
    make = getattr(loss_fn, "head_loss", partial(HeadLoss, loss_fn=loss_fn, of_modules=of_modules))
    return make(batch=batch, scale=scale, num_sources=num_sources)


def tokens_of_chunk(x_NH: torch.Tensor, rows: int) -> int:
    """Returns the number of tokens in a chunk of hidden states `x_NH`, whose head has `rows` rows on this rank."""
    tokens = max(LEAST_TOKENS, (CHUNK_CPU if x_NH.is_cpu else CHUNK_GPU) // rows)
    if x_NH.is_cpu and x_NH.dtype.itemsize < torch.float32.itemsize:
        tokens = max(tokens, min(x_NH.shape[1], LARGEST_CHUNK_CPU // rows))
    return tokens


class _Head:
    """The products of the output head over chunks of hidden states [N, H]. Nothing here is seen by autograd."""

    grad_x: torch.Tensor  # [N, H], this rank's part
    grad_weight: torch.Tensor  # [V/tp, H]

    def __init__(
        self,
        x_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_N: torch.Tensor,
        temperature: float,
        vocab_size: int,
        group: ProcessGroup | None,
        softcap: float | None,
    ):
        self.x, self.weight, self.temperature, self.softcap = x_NH, weight_VH, temperature, softcap
        self.group = group if get_pg_size(group) > 1 else None
        first = len(weight_VH) * group.rank() if self.group and group else 0  # token of this rank's first row
        self.labels, self.own_vocab = labels_N - first, min(len(weight_VH), max(0, vocab_size - first))
        self.wide = torch.promote_types(x_NH.dtype, torch.float32)
        self.tokens = tokens_of_chunk(x_NH, len(weight_VH))
        # All chunks' logits are computed in the same memory.
        rows, columns = min(self.tokens, len(x_NH)), len(weight_VH)
        self._logits = x_NH.new_empty(rows, columns + APART)[:, :columns]

    @torch.no_grad()
    def logprobs(self, slope_N: torch.Tensor | None = None) -> torch.Tensor:
        """Computes the labels' log-probabilities [N] in fp32 or fp64; with the loss's slope by each, gradients too."""
        if slope_N is not None:
            self.grad_x = torch.empty_like(self.x)
            total = torch.zeros(self.weight.shape, dtype=self.wide, device=self.weight.device)
        found = [torch.zeros(0, dtype=self.wide, device=self.x.device)]
        for start in range(0, len(self.x), self.tokens):
            part = slice(start, start + self.tokens)
            logprobs_n, grad_nV = self._chunk(part, None if slope_N is None else slope_N[part])
            found.append(logprobs_n)
            if grad_nV is not None:
                multiply(grad_nV, self.weight, self.grad_x[part])
                add_product(total, grad_nV.t(), self.x[part])
        if slope_N is not None:
            self.grad_weight = total.to(self.weight.dtype)
        return torch.cat(found)

    def _chunk(self, part: slice, slope_n: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns log-probabilities, and with a slope the loss's gradient by the logits, which takes their memory."""
        x_nH, label_n = self.x[part], self.labels[part]
        logits_nV = multiply(x_nH, self.weight.t(), self._logits[: len(x_nH)])
        # Chunks in bf16 are large, see above. Under tensor parallel each part would take all-reduces of its own.
        if self.group or logits_nV.dtype == self.wide:
            return self._rows(logits_nV, label_n, slope_n), None if slope_n is None else logits_nV
        if slope_n is None:
            return torch.cat([self._rows(logits, label, None) for logits, label in in_parts(logits_nV, label_n)]), None
        all_parts = in_parts(logits_nV, label_n, slope_n)
        return torch.cat([self._rows(logits, label, slope) for logits, label, slope in all_parts]), logits_nV

    def _rows(self, logits_nV: torch.Tensor, label_n: torch.Tensor, slope_n: torch.Tensor | None) -> torch.Tensor:
        """Returns the labels' log-probabilities; with a slope, the loss's gradient by the logits takes their place."""
        probs_nV = logits_nV.to(self.wide)
        bent_nV = None  # the derivative of capped logits by logits
        if self.softcap is not None:
            tanh_nV = torch.tanh_(probs_nV.div_(self.softcap))
            bent_nV = 1 - tanh_nV.square() if slope_n is not None else None
            probs_nV = tanh_nV.mul_(self.softcap)
        if self.temperature != 1.0:
            probs_nV.div_(self.temperature)
        probs_nV[:, self.own_vocab :] = float("-inf")
        largest_n = probs_nV.amax(1)
        if self.group:
            dist.all_reduce(largest_n, dist.ReduceOp.MAX, group=self.group)
        probs_nV.sub_(largest_n[:, None])
        rows = probs_nV.shape[1]
        is_here_n = (label_n >= 0) & (label_n < rows)  # other labels are on other ranks
        index_n1 = label_n.clamp(0, rows - 1)[:, None]
        label_logit_n = probs_nV.gather(1, index_n1)[:, 0].where(is_here_n, 0.0)
        sums = torch.stack((probs_nV.exp_().sum(1), label_logit_n))
        if self.group:
            dist.all_reduce(sums, group=self.group)
        logprobs_n = sums[1] - sums[0].log()
        if slope_n is None:
            return logprobs_n
        slope_n = slope_n / self.temperature
        probs_nV.mul_((-slope_n / sums[0])[:, None])
        probs_nV.scatter_add_(1, index_n1, (slope_n * is_here_n)[:, None])
        if bent_nV is not None:
            probs_nV.mul_(bent_nV)
        if probs_nV.dtype != logits_nV.dtype:
            logits_nV.copy_(probs_nV)
        return logprobs_n


class WithGradients(torch.autograd.Function):
    """Returns a loss whose backward pass gives the inputs gradients that were computed beforehand."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        grad_x: torch.Tensor,
        grad_weight: torch.Tensor,
    ) -> torch.Tensor:
        ctx.gradients = grad_x, grad_weight
        return loss.clone()  # a pipeline empties what its last stage gave, and cannot empty a view

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_weight = ctx.gradients
        ctx.gradients = None  # autograd may keep them, instead of a copy
        return None, grad_x.mul_(grad), grad_weight.mul_(grad), None, None
