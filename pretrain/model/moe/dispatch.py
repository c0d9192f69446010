"""Brings tokens to the experts that they chose, and the outputs back.

Every (token, choice) pair is a row, and rows are sorted by expert. Under expert parallel each rank sends rows to the
ranks of their experts in one all-to-all, and gets the outputs back in another (GShard: Lepikhin et al. 2020).

The number of rows is that of all pairs, whatever is computed of them: rows of padding and rows that an expert drops
come last and hold nothing. So sizes are known without asking the device, except under expert parallel, whose messages
have sizes that the host must know.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from pretrain.megatron import (
    all_to_all,
    get_pg_size,
)

# (rows [R, H] sorted by expert, how many each expert has [E]) to [R, H]; rows past the last expert's are undefined
Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Dispatch:
    """The assignment of one micro-batch's rows to experts.

    `experts_TK` are the experts that each token chose out of `num_experts`. Tokens that are not `valid_T` go to none.
    With a `capacity_factor` an expert takes its first ceil(factor * tokens * top_k / num_experts) rows and drops later
    ones, so that no token depends on a later one. `wanted` [E] counts the rows that chose an expert, `counts` [E] those
    that it takes.
    """

    def __init__(
        self,
        experts_TK: torch.Tensor,
        num_experts: int,
        valid_T: torch.Tensor | None = None,
        capacity_factor: float | None = None,
    ):
        num_tokens, top_k = experts_TK.shape
        if valid_T is not None:
            experts_TK = experts_TK.masked_fill(~valid_T[:, None], num_experts)  # which is no expert
        expert_R, pair_R = experts_TK.flatten().sort(stable=True)
        self.wanted = self.counts = _counts(expert_R, num_experts)
        if capacity_factor is not None:
            capacity = math.ceil(capacity_factor * num_tokens * top_k / num_experts)
            first_of = F.pad(self.wanted.cumsum(0) - self.wanted, (0, 1))
            index_in_expert = torch.arange(len(expert_R), device=expert_R.device) - first_of[expert_R]
            taken_R = expert_R.masked_fill(index_in_expert >= capacity, num_experts)
            experts_TK = torch.empty_like(taken_R).scatter(0, pair_R, taken_R).view_as(experts_TK)
            expert_R, pair_R = experts_TK.flatten().sort(stable=True)
            self.counts = _counts(expert_R, num_experts)
        rows = torch.arange(len(pair_R), device=pair_R.device)
        self._kept_TK = experts_TK < num_experts
        row_of_pair = torch.empty_like(pair_R).scatter(0, pair_R, rows).view_as(experts_TK)
        self._row_TK = row_of_pair.masked_fill(~self._kept_TK, 0)
        self._pair_R, self._token_R = pair_R, pair_R // top_k

    def run(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, compute: Compute, group: ProcessGroup | None
    ) -> torch.Tensor:
        """Computes for each token the weighted sum of its experts' outputs, [T, H]."""
        rows = _Spread.apply(x_TH, self._token_R, self._row_TK, self._kept_TK)
        rows = compute(rows, self.counts) if get_pg_size(group) == 1 else self._elsewhere(rows, compute, group)
        weights_TK = weights_TK.to(rows.dtype)
        return _Collect.apply(rows, weights_TK, self._token_R, self._pair_R, self._row_TK, self._kept_TK)

    @torch.compiler.disable  # the sizes of its messages are read on the host, where a graph breaks in any case
    def _elsewhere(self, rows: torch.Tensor, compute: Compute, group: ProcessGroup | None) -> torch.Tensor:
        ep = get_pg_size(group)
        sent = self.counts.view(ep, -1)  # [ranks, experts of a rank]
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=group)
        out_rows, in_rows = exchanged_rows(sent, received, rows)
        arrived = all_to_all(group, rows[: sum(out_rows)], in_rows, out_rows)
        # Rows arrive sorted by sender, then by expert; the computation needs the rows of an expert side by side.
        local = torch.arange(received.shape[1], device=rows.device).repeat(ep)
        by_expert = local.repeat_interleave(received.flatten(), output_size=sum(in_rows)).argsort(stable=True)
        back = torch.empty_like(by_expert).scatter(0, by_expert, torch.arange(len(by_expert), device=rows.device))
        outputs = compute(_Permute.apply(arrived, by_expert, back), received.sum(0))
        outputs = all_to_all(group, _Permute.apply(outputs, back, by_expert), out_rows, in_rows)
        return F.pad(outputs, (0, 0, 0, len(rows) - len(outputs))) if len(outputs) < len(rows) else outputs


def exchanged_rows(sent: torch.Tensor, received: torch.Tensor, rows: torch.Tensor) -> tuple[list[int], list[int]]:
    """Asks the device how many of `rows` go to each rank, and how many come from it.

    `sent` and `received` count them by rank and by the expert of the receiving rank [ranks, experts].
    """
    out_rows, in_rows = torch.stack((sent.sum(1), received.sum(1))).tolist()
    return out_rows, in_rows


def _counts(sorted_R: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Counts the rows of each expert [E]. Unlike `bincount` it asks a GPU for nothing and has a fixed order."""
    ends = torch.searchsorted(sorted_R, torch.arange(num_experts, device=sorted_R.device), right=True)
    return ends.diff(prepend=ends.new_zeros(1))


# Gradients of these functions are gathered as their outputs are, over a token's choices in a fixed order. Autograd
# would scatter them, which on a GPU adds in any order.


class _Spread(torch.autograd.Function):
    """Copies tokens [T, H] to rows [R, H]."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: torch.Tensor, token_R: torch.Tensor, row_TK: torch.Tensor, kept_TK: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(row_TK, kept_TK)
        return x_TH.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        row_TK, kept_TK = ctx.saved_tensors
        return _sum_of_rows(grad_RH, None, row_TK, kept_TK), None, None, None


class _Collect(torch.autograd.Function):
    """Sums rows [R, H] by token, each times the weight of its pair, to [T, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RH: torch.Tensor,
        weights_TK: torch.Tensor,
        token_R: torch.Tensor,
        pair_R: torch.Tensor,
        row_TK: torch.Tensor,
        kept_TK: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_RH, weights_TK, token_R, pair_R, row_TK, kept_TK)
        return _sum_of_rows(rows_RH, weights_TK, row_TK, kept_TK)

    @staticmethod
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows_RH, weights_TK, token_R, pair_R, row_TK, kept_TK = ctx.saved_tensors
        grad_RH = grad_TH.index_select(0, token_R) * weights_TK.flatten().index_select(0, pair_R)[:, None]
        columns = [(grad_TH * rows_RH.index_select(0, row_T)).sum(1) for row_T in row_TK.unbind(1)]
        grad_TK = torch.stack(columns, 1).masked_fill(~kept_TK, 0)
        return grad_RH, grad_TK, None, None, None, None


class _Permute(torch.autograd.Function):
    """Puts rows in the order of `index`, whose inverse is `back`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


def _sum_of_rows(
    rows_RH: torch.Tensor, weights_TK: torch.Tensor | None, row_TK: torch.Tensor, kept_TK: torch.Tensor
) -> torch.Tensor:
    """Sums the kept rows of each token. Others may hold anything, NaN too, so they are replaced, not weighted by 0."""
    total = None
    for choice in range(row_TK.shape[1]):
        part = rows_RH.index_select(0, row_TK[:, choice])
        if weights_TK is not None:
            part.mul_(weights_TK[:, choice, None])
        part.masked_fill_(~kept_TK[:, choice, None], 0)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
