"""SwiGLU experts as stacked weights [E, ...], computed as grouped matrix products over rows sorted by expert.

Tensor parallel splits each expert like a dense MLP, so that outputs are partial sums; expert parallel gives each rank
its share of the experts.
"""

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.model.layer_context import LayerContext
from pretrain.model.slices import TensorSplit, mark_expert, mark_split

ROWS_ALIGNED = 8  # CUDA's grouped product wants groups of rows that start at 16 bytes: 8 numbers in bf16
STRIDE_BYTES = 16  # the grouped product wants rows of matrices that are a multiple of this long


class Experts(nn.Module):
    """This rank's experts of one layer."""

    def __init__(self, num_experts: int, hidden_size: int, ffn_hidden_size: int, context: LayerContext):
        super().__init__()
        local, ffn, tp = num_experts // context.ep_size, ffn_hidden_size // context.tp_size, context.tp_size

        def weight(rows: int, columns: int, split: int) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(local, rows, columns, dtype=context.dtype, device=context.device))
            mark_split(parameter, TensorSplit(split, ffn_hidden_size) if tp > 1 else None)
            mark_expert(parameter)
            return parameter

        self.gate_proj = weight(ffn, hidden_size, split=1)
        self.up_proj = weight(ffn, hidden_size, split=1)
        self.down_proj = weight(hidden_size, ffn, split=2)

    def forward(self, x_RH: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Computes outputs [R, H] of rows sorted by expert; the first `counts[0]` rows are the first expert's.

        Rows past the last expert's are not computed, and their outputs are undefined.
        """
        if x_RH.is_cuda and _has_grouped_product(x_RH):
            return self._aligned(x_RH, counts)
        return self._uncompiled(x_RH, counts)

    # A loop over counts would be compiled again for each count, and a CPU's grouped product in fp32 is unknown to the
    # compiler, which takes the product's dtypes to be CUDA's.
    @torch.compiler.disable
    def _uncompiled(self, x_RH: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if _has_grouped_product(x_RH):
            return self._grouped(x_RH, counts)
        return self._by_loop(x_RH, counts.tolist())

    def _grouped(self, x_RH: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Uses the grouped product; pads H and F with zeros, which add nothing, to the multiples that it requires."""
        ends = counts.cumsum(0).to(torch.int32)
        multiple, hidden_size = STRIDE_BYTES // x_RH.element_size(), x_RH.shape[1]
        more_H, more_F = -hidden_size % multiple, -self.gate_proj.shape[1] % multiple
        x_RH = _widened(x_RH, more_H)
        gate, up = (_widened(w, more_H, more_F).transpose(1, 2) for w in (self.gate_proj, self.up_proj))
        down = _widened(self.down_proj, more_F, more_H).transpose(1, 2)
        inner = F.silu(F.grouped_mm(x_RH, gate, offs=ends)) * F.grouped_mm(x_RH, up, offs=ends)
        return F.grouped_mm(inner, down, offs=ends)[:, :hidden_size]

    def _aligned(self, x_RH: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Puts rows of zeros between experts, so that every expert's first row is aligned as CUDA requires."""
        padded = (counts + ROWS_ALIGNED - 1) // ROWS_ALIGNED * ROWS_ALIGNED
        rows = torch.arange(len(x_RH), device=x_RH.device)
        shift = F.pad((padded - counts).cumsum(0), (1, 0))  # how far an expert's rows move, and those past the last
        indices = rows + shift[torch.searchsorted(counts.cumsum(0), rows, right=True)]
        spread = x_RH.new_zeros(len(x_RH) + len(counts) * ROWS_ALIGNED, x_RH.shape[1]).index_copy(0, indices, x_RH)
        return self._grouped(spread, padded).index_select(0, indices)

    def _by_loop(self, x_RH: torch.Tensor, counts: list[int]) -> torch.Tensor:
        weights = zip(self.gate_proj.unbind(), self.up_proj.unbind(), self.down_proj.unbind(), strict=True)
        outputs = [
            F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
            for x, (gate, up, down) in zip(x_RH[: sum(counts)].split(counts), weights, strict=True)
        ]
        return F.pad(torch.cat(outputs), (0, 0, 0, len(x_RH) - sum(counts)))


def _widened(matrices: torch.Tensor, columns: int, rows: int = 0) -> torch.Tensor:
    """Appends columns and rows of zeros to matrices; returns the same tensor, not a copy, where both numbers are 0."""
    return F.pad(matrices, (0, columns, 0, rows)) if columns or rows else matrices


def _has_grouped_product(x: torch.Tensor) -> bool:
    """Whether torch has a grouped product for `x`: in bf16, and on CPUs in fp32 too, but not for zero rows."""
    kinds = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float32)
    return x.dtype in kinds and len(x) > 0
