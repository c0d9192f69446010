"""megatron-core's schedules and DeepSpeed, imported quietly and, without CUDA, told that the device is the CPU.

Without CUDA: megatron-core's schedules, point-to-point and collective helpers ask torch for "the current CUDA device",
synchronise it, and make one counter on it; these modules then see a `torch` in which the current device is the CPU.
DeepSpeed would guess its accelerator, and compile a shared-memory all-reduce at first use, for which a machine may
lack the compiler and the tests' gloo is enough. With CUDA nothing is changed. Nowhere else is a library touched,
but for a proof in `fp64`.
"""

import logging
import os
import types
import warnings
from typing import Any

import torch

from pretrain.model import megatron  # noqa: F401  first, since it makes the import of megatron-core quick

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.comm.comm
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func, p2p_communication, schedules
    from megatron.core.tensor_parallel import layers, mappings
    from megatron.core.transformer import TransformerConfig

__all__ = [
    "ModelType",
    "TransformerConfig",
    "deepspeed",
    "get_forward_backward_func",
    "parallel_state",
    "redirect_to_cpu",
]

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"megatron\.|deepspeed\.|torch\.distributed")


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
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)

    cuda = _Redirected(torch.cuda, current_device=lambda: torch.device("cpu"), synchronize=lambda *_: None)
    for module in (schedules, p2p_communication, layers, mappings):
        if not isinstance(module.torch, _Redirected):
            module.torch = _Redirected(torch, cuda=cuda, zeros=zeros)  # type: ignore[attr-defined]
