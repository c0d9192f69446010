"""Brings tokens to the experts that they chose, and the outputs back.

Every (token, choice) pair becomes a row, and rows are sorted by expert. Under expert parallel each rank sends rows to
the ranks of their experts in one all-to-all, and gets the outputs back in another (GShard: Lepikhin et al. 2020).
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from pretrain.megatron import (
    all_to_all,
    get_pg_size,
)

# (rows [R, H] sorted by expert, how many each expert has [E]) to [R, H]
Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Dispatch:
    """The assignment of one micro-batch's rows to experts.

    `experts_TK` are the experts that each token chose out of `num_experts`. Tokens that are not `valid_T` go to none.
    With a `capacity_factor` an expert takes its first ceil(factor * tokens * top_k / num_experts) rows and drops later
    ones, so that no token depends on a later one.
    """

    def __init__(
        self,
        experts_TK: torch.Tensor,
        num_experts: int,
        valid_T: torch.Tensor | None = None,
        capacity_factor: float | None = None,
    ):
        self.num_tokens, self.top_k = experts_TK.shape
        self.num_experts = num_experts
        chosen = experts_TK.flatten()
        if valid_T is not None:
            chosen = chosen.masked_fill(~valid_T.repeat_interleave(self.top_k), num_experts)
        order = chosen.argsort(stable=True)
        self.wanted = torch.bincount(chosen, minlength=num_experts + 1)[:num_experts]
        self.order, self.counts = order[: int(self.wanted.sum())], self.wanted
        if capacity_factor is not None:
            capacity = math.ceil(capacity_factor * self.num_tokens * self.top_k / num_experts)
            first = self.wanted.cumsum(0) - self.wanted
            index_in_expert = torch.arange(len(self.order), device=order.device) - first.repeat_interleave(self.wanted)
            self.order, self.counts = self.order[index_in_expert < capacity], self.wanted.clamp(max=capacity)

    def run(
        self, x_TH: torch.Tensor, weights_TK: torch.Tensor, compute: Compute, group: ProcessGroup | None
    ) -> torch.Tensor:
        """Computes for each token the weighted sum of its experts' outputs, [T, H]."""
        pairs = x_TH[:, None].expand(-1, self.top_k, -1).flatten(0, 1)
        rows = pairs.index_select(0, self.order)
        rows = compute(rows, self.counts) if get_pg_size(group) == 1 else self._elsewhere(rows, compute, group)
        rows = rows * weights_TK.flatten().index_select(0, self.order)[:, None].to(rows.dtype)
        # Rows return to token order and are summed over a token's choices in a fixed order, unlike index_add on a GPU.
        return torch.zeros_like(pairs).index_copy(0, self.order, rows).unflatten(0, (-1, self.top_k)).sum(1)

    @torch.compiler.disable  # the sizes of its messages are read on the host, where a graph breaks in any case
    def _elsewhere(self, rows: torch.Tensor, compute: Compute, group: ProcessGroup | None) -> torch.Tensor:
        ep = get_pg_size(group)
        sent = self.counts.view(ep, -1)  # [ranks, experts of a rank]
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=group)
        out_rows, in_rows = sent.sum(1).tolist(), received.sum(1).tolist()
        rows = all_to_all(group, rows, in_rows, out_rows)
        # Rows arrive sorted by sender, then by expert; the computation needs the rows of an expert side by side.
        local = torch.arange(received.shape[1], device=rows.device).repeat(ep)
        by_expert = local.repeat_interleave(received.flatten()).argsort(stable=True)
        outputs = compute(rows.index_select(0, by_expert), received.sum(0))
        outputs = torch.empty_like(outputs).index_copy(0, by_expert, outputs)
        return all_to_all(group, outputs, out_rows, in_rows)
