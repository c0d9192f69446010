"""The weights of layers with adapters kept in 4 bits (QLoRA, Dettmers et al. 2023).

A layer's weight is made from its codes whenever the layer uses it, also in the backward pass: autograd keeps the codes
in place of the weight. Adapters and activations have the model's own precision, and gradients go through the weight
and not to it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from pretrain.model.adapters import nf4
from pretrain.model.decoder import Block
from pretrain.model.slices import WHOLE, Slices, mark, marks_of
from pretrain.model.tensor_parallel import ColumnLinear, RowLinear, WholeLinear

NAME = "quantized"  # of the module in its layer


class QuantizedWeight(nn.Module):
    """One rank's slice of a matrix [out, in] that is quantised whole; `fill` must come before the first use."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.marks, self.dtype, self.device = marks_of(weight), weight.dtype, weight.device
        # Shape and marks of the slice, in a list so that it is no parameter.
        self._outline = [nn.Parameter(torch.empty(weight.shape, device="meta"), requires_grad=False)]
        mark(self.outline, self.marks)
        self.codes = torch.empty(0, dtype=torch.uint8)
        self.whole: nf4.NF4 | None = None
        self.offset: tuple[int, ...] = (0, 0)

    @property
    def outline(self) -> nn.Parameter:
        """A parameter without values that has the slice's shape and marks."""
        return self._outline[0]

    @property
    def memory_bytes(self) -> int:
        """The size of the codes of this slice, and of the scales of the whole matrix."""
        assert self.whole is not None, "the weight was not filled"
        return sum(part.nbytes for part in (self.codes, self.whole.scales, self.whole.scale_blocks))

    def fill(self, whole: torch.Tensor, slices: Slices = WHOLE) -> None:
        """Quantises the whole matrix and keeps this rank's slice of its codes."""
        found = nf4.quantized(whole.to(self.device))
        zero = nf4.LEVELS.index(0.0)
        codes = slices.cut(found.codes.view(found.shape).to(torch.int8) - zero, self.outline) + zero  # padding is 0.0
        self.codes, self.offset = nf4.packed(codes.flatten().to(torch.uint8)), slices.offset(self.outline)
        found.codes = torch.empty(0, dtype=torch.uint8)  # of the whole only the scales are needed
        self.whole = found

    def weight(self) -> torch.Tensor:
        """Makes the slice from its codes, in the layer's precision."""
        assert self.whole is not None, "the weight was not filled"
        (rows, columns), (own_rows, own_columns) = self.whole.shape, self.outline.shape
        levels = torch.tensor(nf4.LEVELS, device=self.codes.device)
        values = levels[nf4.unpacked(self.codes, own_rows * own_columns).int()].view(own_rows, own_columns)
        made = (values * self._scales(rows, columns)).to(self.dtype)
        vars(made)[NAME] = self  # for `_pack`
        return made

    def _scales(self, rows: int, columns: int) -> torch.Tensor:
        """Returns the scale of every element of the slice, [out, in]."""
        assert self.whole is not None
        scales, (own_rows, own_columns) = self.whole.whole_scales(), self.outline.shape
        (first_row, first_column), device = self.offset, self.codes.device
        if columns % nf4.BLOCK == own_columns % nf4.BLOCK == 0 and first_row + own_rows <= rows:  # as in most models
            blocks = slice(first_column // nf4.BLOCK, (first_column + own_columns) // nf4.BLOCK)
            own = scales.view(rows, -1)[first_row : first_row + own_rows, blocks]
            return own.repeat_interleave(nf4.BLOCK, 1)
        row = (first_row + torch.arange(own_rows, device=device)).clamp(max=rows - 1)
        column = (first_column + torch.arange(own_columns, device=device)).clamp(max=columns - 1)
        return scales[(row[:, None] * columns + column) // nf4.BLOCK]


class _Quantized:
    """Linear layer that makes its weight from codes of 4 bits each time it is used."""

    quantized: QuantizedWeight

    @property
    def weight(self) -> torch.Tensor:
        return self.quantized.weight()


class QuantizedColumnLinear(_Quantized, ColumnLinear):  # type: ignore[misc]
    """Column layer with its weight in 4 bits."""


class QuantizedRowLinear(_Quantized, RowLinear):  # type: ignore[misc]
    """Row layer with its weight in 4 bits."""


class QuantizedWholeLinear(_Quantized, WholeLinear):  # type: ignore[misc]
    """Whole layer with its weight in 4 bits."""


_QUANTIZED: dict[type, type] = {
    ColumnLinear: QuantizedColumnLinear,
    RowLinear: QuantizedRowLinear,
    WholeLinear: QuantizedWholeLinear,
}


def quantize(layer: nn.Module) -> None:
    """Replaces a layer's weight by a `QuantizedWeight`, whose codes are filled in later."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    del layer.weight
    layer.add_module(NAME, QuantizedWeight(weight))
    layer.__class__ = _QUANTIZED[type(layer)]


def quantized_weights(module: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yields the weights of a decoder that are in 4 bits, by their global names."""
    for name, each in module.named_modules():
        if isinstance(each, QuantizedWeight):
            yield f"{name.removesuffix(NAME)}weight", each


def save_codes(block: Block) -> None:
    """Lets autograd keep the codes of 4 bits for the backward pass, in place of the weights made from them."""
    forward: Callable[..., torch.Tensor] = block.forward

    def with_codes(*args: Any, **keys: Any) -> torch.Tensor:
        with saved_tensors_hooks(_pack, _unpack):
            return forward(*args, **keys)

    vars(block)["forward"] = with_codes


def _pack(tensor: torch.Tensor) -> Any:
    """Returns what autograd keeps: for a view of a weight made from codes, the codes and where the view lies in it."""
    base = tensor if tensor._base is None else tensor._base
    maker = vars(base).get(NAME) if hasattr(base, "__dict__") else None
    return tensor if maker is None else (maker, tensor.shape, tensor.stride(), tensor.storage_offset())


def _unpack(kept: Any) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    maker, shape, stride, offset = kept
    return maker.weight().as_strided(shape, stride, offset)
