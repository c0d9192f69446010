"""megatron-core, imported quickly and quietly; the rest of Trivium imports it after, or by way of, this file.

While it is imported, megatron-core passes fused kernels that Trivium does not use to `torch.compile`. That loads all
of Inductor, which takes seconds on every rank. It also warns of each accelerator package that is not installed. During
that import, this file makes `torch.compile` return functions unchanged and silences warnings.
"""

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    return (lambda decorated: decorated) if function is None else function


with mock.patch.object(torch, "compile", _as_it_is), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import tensor_parallel
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.utils import get_pg_size

__all__ = ["ModelParallelConfig", "get_pg_size", "tensor_parallel"]
