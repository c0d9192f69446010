"""Lets DeepSpeed's optimizers run on torch's `meta` device, whose tensors have shapes and no values.

DeepSpeed takes the device for its accelerator. The values that it reads are few: the gradient norm, whether a gradient
is not finite, and, in its first passes of stage 3, lists that all ranks must have alike. Such a value is given as zero
or False, so no gradient counts as infinite. What an offloaded optimizer keeps in host memory stays on `meta`, too.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import deepspeed.accelerator.cpu_accelerator
import deepspeed.accelerator.real_accelerator
import deepspeed.runtime.zero.linear
import deepspeed.runtime.zero.partitioned_param_coordinator as stage3
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

META = torch.device("meta")
_READS = (Tensor.item, Tensor.__bool__, Tensor.__float__)


@contextlib.contextmanager
def deepspeed_on_meta() -> Iterator[None]:
    """Context manager in which DeepSpeed's engines and optimizers are made and run on the meta device."""
    accelerators = deepspeed.accelerator.real_accelerator
    before = accelerators.get_accelerator()
    with contextlib.ExitStack() as stack:
        # Linear layers of stage 3 ask for the autocast of a device, which meta has not.
        stack.enter_context(mock.patch.object(deepspeed.runtime.zero.linear, "get_accelerator", lambda: before))
        stack.enter_context(mock.patch.object(stage3, "assert_ints_same_as_other_ranks", _sent_by_first_rank))
        stack.enter_context(mock.patch.object(accelerators, "ds_accelerator", _MetaAccelerator()))
        stack.enter_context(_WithoutValues())
        yield


class _MetaAccelerator(deepspeed.accelerator.cpu_accelerator.CPU_Accelerator):
    """DeepSpeed's description of the meta device, which like a CPU has no streams to wait for."""

    FloatTensor = staticmethod(lambda values: torch.empty(len(values), device=META))  # as CUDA's, of a list

    def device_name(self, device_index: int | None = None) -> str:
        return "meta"

    def current_device_name(self) -> str:
        return "meta"

    def current_device(self) -> torch.device:
        return META

    def on_accelerator(self, tensor: Tensor) -> bool:
        return tensor.is_meta

    def pin_memory(self, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        return tensor


def _sent_by_first_rank(numbers: Sequence[int]) -> None:
    """Broadcasts as DeepSpeed does to compare a list with that of the first rank: its length, then the list."""
    for values in ([len(numbers)], numbers):
        dist.broadcast(torch.empty(len(values), dtype=torch.int64, device=META), src=0)


class _WithoutValues(TorchFunctionMode):
    """Context manager in which a value that is read is zero, and DeepSpeed's tensors in host memory are on `meta`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func in _READS and args[0].is_meta:
            return func(torch.zeros((), dtype=args[0].dtype))
        if func is Tensor.cpu and args[0].is_meta:
            return args[0]
        by_deepspeed = "deepspeed" in sys._getframe(1).f_globals.get("__name__", "")
        if by_deepspeed or (func is Tensor.to and args[0].is_meta):
            args = tuple(_on_meta(value) for value in args)
            options = {name: _on_meta(value) for name, value in options.items()}
        return func(*args, **options)


def _on_meta(value: Any) -> Any:
    """Returns the meta device for the CPU, and any other argument as it is."""
    is_cpu = value == "cpu" if isinstance(value, str) else isinstance(value, torch.device) and value.type == "cpu"
    return META if is_cpu else value
