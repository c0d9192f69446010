"""Low-rank adapters of linear layers: LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024).

LoRA turns y = x Wᵀ into y = x Wᵀ + s (x Aᵀ) Bᵀ with A [rank, in] drawn at random and B [out, rank] zero, so that the
model begins as its base. DoRA also trains the length of each row of the weight: W + s B A with every row divided by its
length, which gradients take for a constant (section 4.3), and multiplied by a magnitude. The magnitude is kept as a
multiple of the length of the base's row, and so begins at exactly 1 in any precision.

Tensor parallel splits what the layer splits. In a column layer A is whole on every rank and B is split as the rows of
W; in a row layer A is split as the columns of W and B is whole. Only the `rank` numbers a token between them cross
ranks. Sequence parallel gives a rank's whole matrices a part of their gradient, as it does to norms.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from configs.adapters import AdapterConfig
from pretrain.model.layer_context import LayerContext
from pretrain.model.layers import Dropout, kept
from pretrain.model.slices import Marks, mark, marks_of
from pretrain.model.tensor_parallel import ColumnLinear, Region, RowLinear, WholeLinear


class LowRank(nn.Module):
    """LoRA, rsLoRA or DoRA of a linear layer; `std` is the deviation of B's first values, 0 in training.

    The layer calls `reduced` with its inputs outside of split layers, and `added` with its output.
    """

    def __init__(
        self,
        layer: ColumnLinear | RowLinear | WholeLinear,
        name: str,
        config: AdapterConfig,
        context: LayerContext,
        std: float,
    ):
        super().__init__()
        weight, self.scale, self.rank, self.region = layer.weight, config.scale, config.rank, Region(context)
        # In a list, so that it is not a parameter of this module too; LoRA's weight may be in 4 bits later.
        self._weight = [weight] if config.kind == "dora" else []
        split = marks_of(weight).split
        is_row = isinstance(layer, RowLinear)
        size_in = split.size if is_row and split else weight.shape[1]
        # Every rank has all that its slice of a split matrix sees; of what a whole one sees it may have a part.
        in_split, out_split = (split, None) if is_row else (None, split)
        of_inputs = Marks(split=in_split, partial="never" if in_split else "sequence", std=_std_of_a(size_in))
        of_outputs = Marks(split=out_split, partial="never" if out_split else "sequence", constant=0.0)
        self.a = parameter_like(weight, (config.rank, weight.shape[1]), of_inputs)
        self.b = parameter_like(weight, (weight.shape[0], config.rank), _drawn(of_outputs, std))
        self.sums_over_ranks = is_row and split is not None
        self.register_parameter("magnitude", None)
        if config.kind == "dora":
            self.magnitude = parameter_like(weight, (weight.shape[0],), replace(of_outputs, constant=1.0, decays=False))
        part = (context.cp_rank, context.cp_size) if is_row else context.sequence_part
        columns = (context.tp_rank, context.tp_size) if self.sums_over_ranks else (0, 1)
        self.dropout = InputDropout(name, config.dropout, context.seed, part, columns)

    def reduced(self, x: torch.Tensor) -> torch.Tensor:
        """Computes x Aᵀ, [..., rank], whole on every rank, or with sequence parallel of this rank's tokens."""
        z = F.linear(self.dropout(x), self.a)
        return self.region.leave(z) if self.sums_over_ranks else z

    def added(self, y: torch.Tensor, z: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Returns the adapted output, given the layer's output `y`, its bias, and `z` of `reduced`."""
        delta = self.scale * F.linear(z, self.b)
        if self.magnitude is None:
            return y + delta
        factor = (self.magnitude * self._row_ratio()).to(y.dtype)
        product = y if bias is None else y - bias
        return y + (factor - 1) * product + factor * delta

    @torch.no_grad()
    def _row_ratio(self) -> torch.Tensor:
        """Returns the length of each row of the base's weight, divided by its length with the product added."""
        weight = self._weight[0].to(torch.promote_types(self.a.dtype, torch.float32))
        whole = weight + self.scale * (self.b.to(weight.dtype) @ self.a.to(weight.dtype))
        squares = torch.stack([weight.square().sum(1), whole.square().sum(1)])
        if self.sums_over_ranks:
            dist.all_reduce(squares, group=self.region.group)
        return (squares[0] / squares[1]).sqrt()


class ExpertLowRank(nn.Module):
    """LoRA of one of the matrices of all experts: a pair of A and B for each expert, of which a rank has its own.

    Within the experts tensor-parallel ranks have all tokens and a slice of the inner size, so the pair's whole matrix
    gets a part of its gradient on each of them.
    """

    def __init__(self, weight: nn.Parameter, config: AdapterConfig, std: float):
        super().__init__()
        self.scale, marks = config.scale, marks_of(weight)
        split, size_in = marks.split, weight.shape[2]
        is_row = split is not None and split.dim == 2
        if is_row and split is not None:
            size_in = split.size
        in_split, out_split = (split, None) if is_row else (None, split)
        of_inputs = Marks(split=in_split, partial="never" if in_split else "heads", std=_std_of_a(size_in))
        of_outputs = Marks(split=out_split, partial="never" if out_split else "heads", constant=0.0)
        of_inputs, of_outputs = (replace(each, is_expert=True) for each in (of_inputs, _drawn(of_outputs, std)))
        self.a = parameter_like(weight, (len(weight), config.rank, weight.shape[2]), of_inputs)
        self.b = parameter_like(weight, (len(weight), weight.shape[1], config.rank), of_outputs)

    def forward(self, rows: torch.Tensor, expert: int) -> torch.Tensor:
        """Computes for one of this rank's experts what LoRA adds to the product of these rows with its weight."""
        return self.scale * F.linear(F.linear(rows, self.a[expert]), self.b[expert])


class InputDropout(Dropout):
    """Dropout of an adapter's inputs [S, B, H], of which this rank has the part `columns` (index, count) of H.

    The block that holds it sets `samples`, the rows' numbers in the run, before each forward pass.
    """

    def __init__(self, name: str, rate: float, seed: int, part: tuple[int, int], columns: tuple[int, int]):
        nn.Module.__init__(self)
        self.name, self.rate, self.seed, self.columns = name, rate, seed, columns
        self.part, self.parts = part
        self.samples: torch.Tensor | None = None

    def forward(self, x_SBH: torch.Tensor, samples: torch.Tensor | None = None) -> torch.Tensor:
        if not (self.training and self.rate):
            return x_SBH
        assert self.samples is not None, "dropout is keyed by sample"
        own, count = self.columns
        whole = x_SBH.detach()[..., :1].expand(*x_SBH.shape[:2], x_SBH.shape[2] * count)
        mask = kept(whole, self.samples, f"{self.seed}/{self.name}", self.rate, self.part, self.parts)
        return x_SBH * mask.chunk(count, -1)[own].to(x_SBH.dtype) / (1 - self.rate)


def parameter_like(like: torch.Tensor, shape: tuple[int, ...], marks: Marks) -> nn.Parameter:
    """Makes a parameter of the precision and device of `like`, with its marks."""
    parameter = nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))
    mark(parameter, marks)
    return parameter


def _std_of_a(size_in: int) -> float:
    """Returns the deviation of A's first values, which is that of PEFT's (uniform up to 1 / sqrt(in))."""
    return float((3 * size_in) ** -0.5)


def _drawn(marks: Marks, std: float) -> Marks:
    """Returns the marks of a matrix whose first values have the deviation `std`, if that is not 0."""
    return replace(marks, constant=None, std=std) if std else marks
