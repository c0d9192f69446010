"""Norm and rotation in forward passes that are not compiled, by kernels in C++ (`elementwise.cpp`).

Torch's own operations make five to ten passes over small tensors for each, and in a sampler's step of one token a row
every one of them costs more than its work. The functions here return None for tensors that the kernels do not take.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

from pretrain.model.native.building import plain_library

SOURCE = Path(__file__).parent / "elementwise.cpp"
DTYPES = (torch.float32, torch.bfloat16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Computes f x weight [..., size] and, in fp32, f = 1 / sqrt(mean(x²) + eps) of the last dimension, [..., 1]."""
    kernels = _kernels_for(x, weight)
    if kernels is None:
        return None
    y, size = torch.empty_like(x), len(weight)
    factor = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    kernels.rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        factor.data_ptr(),
        x.numel() // size,
        size,
        eps,
        torch.get_num_threads(),
        _is_bf16(x),
    )
    return y, factor


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor | None:
    """Rotates every pair (x_i, x_{i+D/2}) of heads [S, B, N, D] by the angles of cos and sin [S, B, 1, D]."""
    kernels = _kernels_for(x, cos, sin)
    if kernels is None or cos.shape[:2] != x.shape[:2]:
        return None
    y, (length, rows, heads, size) = torch.empty_like(x), x.shape
    kernels.rotate_halves(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        length * rows,
        heads,
        size // 2,
        torch.get_num_threads(),
        _is_bf16(x),
    )
    return y


def _is_bf16(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _kernels_for(x: torch.Tensor, *others: torch.Tensor) -> ctypes.CDLL | None:
    """Returns the kernels if they take these tensors."""
    dtype = x.dtype
    if dtype not in DTYPES or x.device.type != "cpu" or not x.is_contiguous():
        return None
    for other in others:
        if other.dtype != dtype or not other.is_contiguous():
            return None
    return _library()


@cache
def _library() -> ctypes.CDLL | None:
    library = plain_library(SOURCE)
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.rms_norm.argtypes = [pointer] * 4 + [number] * 2 + [ctypes.c_float] + [number] * 2
        library.rotate_halves.argtypes = [pointer] * 4 + [number] * 5
        library.rms_norm.restype = library.rotate_halves.restype = None
    return library
