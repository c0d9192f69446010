"""Attention of one new token a row to the key-value cache, by a kernel in C++ (`cache_attention.cpp`).

SDPA's kernel is made for many queries: for one it takes about three times as long. Ours reads each row's own tokens and
no padding, and what rows share (`SharedTokens`) only once. It needs a C++ compiler once, for some seconds; without one
`kernel` returns None, and SDPA is used.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch

from pretrain.model.native.building import plain_library

SOURCE = Path(__file__).parent / "cache_attention.cpp"
DTYPES = (torch.float32, torch.bfloat16)

# See `attend_to_cache`.
Kernel = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class SharedTokens:
    """First tokens that rows have in common: row b's first `count_B[b]` are those of the row `leader_B[b]`.

    `order_B` are the rows in an order that has those with one leader next to one another.
    """

    order_B: np.ndarray
    leader_B: np.ndarray
    count_B: np.ndarray

    @classmethod
    def of(cls, origin_B: np.ndarray, count_B: np.ndarray) -> "SharedTokens":
        """Makes the first row of each origin the leader of all rows that have it."""
        _, first, of_row = np.unique(origin_B, return_index=True, return_inverse=True)
        leader_B = first[of_row]
        return cls(np.argsort(leader_B, kind="stable"), leader_B, count_B.copy())

    @cached_property
    def addresses(self) -> tuple[int, int, int]:
        """The addresses of the three arrays, which every layer of every step asks for."""
        return self.order_B.ctypes.data, self.leader_B.ctypes.data, self.count_B.ctypes.data


def kernel(dtype: torch.dtype, device: torch.device) -> Kernel | None:
    """Returns the kernel for numbers of this kind on this device, or None where there is none."""
    if device.type != "cpu" or dtype not in DTYPES or _function() is None:
        return None
    return attend_to_cache


def attend_to_cache(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions_B: torch.Tensor,
    shared: SharedTokens | None = None,
    new: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Computes attention [B, N, D] of queries, at these positions, to the stored tokens up to their own.

    `q` is [B, N, D]; keys and values are [>= B, K, slots, D], all contiguous, and the memory that is read is that of
    `B` rows. The `new` keys and values [B, K, D] are stored at the positions first; without them all are stored
    already. Scores are divided by the square root of D.
    """
    function = _function()
    assert function is not None, "ask `kernel` first"
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    whole = () if new is None else (new[0].contiguous(), new[1].contiguous())  # kept until the kernel has read them
    added = tuple(x.data_ptr() for x in whole) or (None, None)
    rows, heads, size = q.shape
    if shared is None:
        shared = SharedTokens.of(np.arange(rows), np.zeros(rows, dtype=np.int64))
    function(
        q.data_ptr(),
        *added,
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        positions_B.data_ptr(),
        *shared.addresses,
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
    library = plain_library(SOURCE)
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found = library.attend_to_cache
    found.argtypes = [pointer] * 10 + [number] * 5 + [ctypes.c_float] + [number] * 2
    found.restype = None
    return found
