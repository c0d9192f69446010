"""Under ZeRO-3, keeps autograd from holding on to gathered weights between forward and backward.

Stage 3 gathers a module's weights for its forward pass, lets go of them, and gathers them again for its backward pass.
But autograd saves views for backward: a linear layer its transposed weight, a stack of experts each expert's part. A
view keeps all that was gathered in memory, in the end every layer's weights at once, as if they had not been split.
So a view of a gathered weight is saved as a recipe, and backward takes it anew from what is gathered by then.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class _Recipe:
    parameter: nn.Parameter
    offset: int  # from the parameter's first element
    size: torch.Size
    stride: tuple[int, ...]


class SavedAsRecipes(saved_tensors_hooks):
    """A context for the forward pass of a module that DeepSpeed has wrapped already."""

    def __init__(self, module: nn.Module):
        super().__init__(self._pack, self._unpack)
        self._gathered: dict[int, list[nn.Parameter]] = {}  # by address of the storage
        for part in module.modules():
            part.register_forward_pre_hook(self._note)

    def __enter__(self) -> None:
        self._gathered.clear()
        super().__enter__()

    def _note(self, part: nn.Module, _: Any) -> None:
        for parameter in part.parameters(recurse=False):
            self._gathered.setdefault(_address(parameter), []).append(parameter)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Recipe:
        address = _address(tensor)
        for parameter in self._gathered.get(address, ()):
            offset = int(tensor.storage_offset()) - int(parameter.storage_offset())
            # The address may be another tensor's by now, and a storage may hold several weights.
            if _address(parameter) == address and 0 <= offset < parameter.numel():
                return _Recipe(parameter, offset, tensor.size(), tensor.stride())
        return tensor.detach()  # the tensor itself could make a cycle with the graph that saves it

    def _unpack(self, saved: torch.Tensor | _Recipe) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        weight = saved.parameter.detach()
        return weight.as_strided(saved.size, saved.stride, weight.storage_offset() + saved.offset)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
