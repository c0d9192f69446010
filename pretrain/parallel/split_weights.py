"""Builds a model for ZeRO stage 3 whose weights are split as they are drawn, so that no rank ever holds all of them.

Modules are built with weights that have a shape but no memory. One weight after another is then given memory, drawn,
and split: the rank keeps its share, and the rest is freed. A rank so needs memory for its share of the model and for
the largest weight.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pretrain.parallel.deepspeed_import import deepspeed, device_as_local_rank
from pretrain.parallel.groups import Mesh


class WithoutMemory(TorchFunctionMode):
    """Context manager in which `torch.empty`, which makes the weights of every layer, frees the memory at once."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.empty:
            result.untyped_storage().resize_(0)
        return result


class SplitAfterDrawing:
    """Gives context managers in which a weight is drawn: it has memory inside, and is split at the end."""

    def __init__(self, mesh: Mesh, dtype: torch.dtype):
        # DeepSpeed converts the weights of a module; an empty one leaves it nothing but its settings to make.
        with device_as_local_rank(mesh.device):
            self._zero = deepspeed.zero.Init(module=nn.Module(), data_parallel_group=mesh.zero_group, dtype=dtype)

    def __call__(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        return self._whole(parameter)

    @contextmanager
    def _whole(self, parameter: nn.Parameter) -> Iterator[None]:
        parameter.untyped_storage().resize_(parameter.numel() * parameter.element_size())
        yield
        known: Any = parameter
        self._zero._convert_to_deepspeed_param(known)
        known.partition()
