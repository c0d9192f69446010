"""Attention of one new token a row to the key-value cache, by a kernel in C++ (`cache_attention.cpp`).

SDPA's kernel is made for many queries: for one it takes about three times as long. Ours reads each row's own tokens and
no padding. It needs a C++ compiler once, for some seconds; without one `kernel` returns None, and SDPA is used.
"""

import ctypes
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from pretrain.model.native.building import built

SOURCE = Path(__file__).parent / "cache_attention.cpp"
# Sums may be taken in the order of vectors, and a NaN stays one.
ORDER = ("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros")
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", *ORDER)
DTYPES = (torch.float32, torch.bfloat16)

# (q [B, N, D], keys and values [>= B, K, slots, D], positions [B], all contiguous) to the outputs [B, N, D]
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def kernel(dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """Returns the kernel for numbers of this kind on this device, or None where there is none."""
    if device.type != "cpu" or dtype not in DTYPES or _function() is None:
        return None
    return attend_to_cache


def attend_to_cache(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions_B: torch.Tensor
) -> torch.Tensor:
    """Computes attention of queries, at these positions, to the stored tokens up to their own; see `Kernel`.

    Scores are divided by the square root of D. The memory that is read is that of `B` rows.
    """
    function = _function()
    assert function is not None, "ask `kernel` first"
    out = torch.empty_like(q)
    rows, heads, size = q.shape
    function(
        *(x.data_ptr() for x in (q, keys, values, out, positions_B)),
        rows,
        keys.shape[1],
        heads // keys.shape[1],
        keys.shape[2],
        size,
        size**-0.5,
        torch.get_num_threads(),
        q.dtype == torch.bfloat16,
    )
    return out


@cache
def _function() -> Callable[..., None] | None:
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    processor = f"{platform.machine()} {sorted(torch.cpu.get_capabilities().items())}"
    try:
        library = built(SOURCE, (*FLAGS, native), (), Path.home() / ".cache" / "trivium", processor)
        found: Callable[..., None] = ctypes.CDLL(str(library)).attend_to_cache
    except (OSError, RuntimeError):  # no compiler, no home folder, or a folder that cannot be written to
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    typed: object = found
    typed.argtypes = [pointer] * 5 + [number] * 5 + [ctypes.c_float] + [number] * 2  # type: ignore[attr-defined]
    typed.restype = None  # type: ignore[attr-defined]
    return found
