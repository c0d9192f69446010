"""Under ZeRO-3, keeps autograd from holding gathered weights in memory between forward and backward.

Stage 3 gathers a module's weights for its forward pass, frees them, and gathers them again for its backward pass. But
autograd saves views of weights for backward: a linear layer its transposed weight, stacked experts each expert's part.
A view keeps the whole gathered tensor in memory, and after the forward pass all layers' weights would be held at once,
as if ZeRO had not split them. So a view of a gathered weight is saved as its offset, size and strides, and the backward
pass makes the view again from the weight gathered by then.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class _View:
    """Offset, size and strides of a view of a parameter, from which the view can be made again."""

    parameter: nn.Parameter
    offset: int  # from the parameter's first element
    size: torch.Size
    stride: tuple[int, ...]


class RebuiltViews(saved_tensors_hooks):
    """Context manager around forward passes of `module`, which DeepSpeed has wrapped before: saves `_View`s."""

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

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _View:
        address = _address(tensor)
        for parameter in self._gathered.get(address, ()):
            offset = int(tensor.storage_offset()) - int(parameter.storage_offset())
            # A freed weight's address may belong to another tensor by now, and one storage may hold several weights.
            if _address(parameter) == address and 0 <= offset < parameter.numel():
                return _View(parameter, offset, tensor.size(), tensor.stride())
        return tensor.detach()  # the tensor itself refers to the graph that saves it, and the cycle would not be freed

    def _unpack(self, saved: torch.Tensor | _View) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        weight = saved.parameter.detach()
        return weight.as_strided(saved.size, saved.stride, weight.storage_offset() + saved.offset)


def _address(tensor: torch.Tensor) -> int:
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata  # without memory there is only the storage itself
