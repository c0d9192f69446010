"""What must be told to megatron-core on a machine without CUDA, and nowhere else.

Its schedules, point-to-point and collective helpers ask torch for "the current CUDA device", synchronise it, and
make one counter on it. Without CUDA these modules see a `torch` in which the current device is the CPU. With CUDA
nothing is touched.
"""

import types
from typing import Any

import torch


class _Redirected(types.ModuleType):
    """A module seen through: attributes of `original`, with some replaced."""

    def __init__(self, original: types.ModuleType, **replaced: Any):
        super().__init__(original.__name__)
        self.__dict__.update(replaced)
        self.__dict__["_original"] = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


def redirect_to_cpu() -> None:
    """Does it, once. Does nothing where CUDA is there."""
    if torch.cuda.is_available():
        return
    from megatron.core.pipeline_parallel import p2p_communication, schedules
    from megatron.core.tensor_parallel import layers, mappings

    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)

    cuda = _Redirected(torch.cuda, current_device=lambda: torch.device("cpu"), synchronize=lambda *_: None)
    for module in (schedules, p2p_communication, layers, mappings):
        if not isinstance(module.torch, _Redirected):
            module.torch = _Redirected(torch, cuda=cuda, zeros=zeros)  # type: ignore[attr-defined]
