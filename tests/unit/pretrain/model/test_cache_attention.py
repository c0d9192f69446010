"""The kernel of attention to the key-value cache against fp64, beside SDPA's; and that rows do not see one another."""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pretrain.model.native import building, cache_attention

pytestmark = pytest.mark.skipif(not any(map(shutil.which, building.COMPILERS)), reason="there is no C++ compiler")
SLOTS = 48
# Rows, key-value heads, query heads that share one, and elements of a head: sizes with loops of their own, and others.
SIZES = [(9, 2, 2, 32), (3, 1, 8, 64), (5, 3, 1, 6), (2, 1, 3, 72)]
AttentionInputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def drawn(rows: int, kv_heads: int, sharing: int, size: int, dtype: torch.dtype) -> AttentionInputs:
    draw = torch.Generator().manual_seed(3)
    q = torch.randn(rows, kv_heads * sharing, size, generator=draw).to(dtype)
    keys, values = (3 * torch.randn(rows, kv_heads, SLOTS, size, generator=draw).to(dtype) for _ in range(2))
    positions = torch.randint(SLOTS, (rows,), generator=draw)
    positions[0], positions[-1] = 0, SLOTS - 1
    return q, keys, values, positions


def by_sdpa(inputs: AttentionInputs, dtype: torch.dtype) -> torch.Tensor:
    q, keys, values, positions = (x if x.dtype == torch.int64 else x.to(dtype) for x in inputs)
    seen = torch.arange(SLOTS) <= positions[:, None, None, None]
    heads = q.unflatten(1, (keys.shape[1], -1))
    return F.scaled_dot_product_attention(heads, keys, values, attn_mask=seen).flatten(1, 2)


@pytest.mark.parametrize("dtype", cache_attention.DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_outputs_are_as_near_to_exact_ones_as_those_of_torch(
    sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    inputs = drawn(*sizes, dtype)
    kernel = cache_attention.kernel(dtype, torch.device("cpu"))
    assert kernel is not None
    found, exact = kernel(*inputs), by_sdpa(inputs, torch.float64)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-20  # in fp32 also that of a few dozen sums
    assert (found.double() - exact).abs().max() <= rounding * exact.abs().max()
    assert found.dtype == dtype and found.shape == inputs[0].shape


def test_a_row_has_the_same_bits_alone_with_longer_rows_and_on_two_threads() -> None:
    q, keys, values, positions = drawn(*SIZES[0], torch.float32)
    together = cache_attention.attend_to_cache(q, keys, values, positions)
    for row in range(len(q)):
        alone = cache_attention.attend_to_cache(*(x[row : row + 1] for x in (q, keys, values, positions)))
        assert torch.equal(alone[0], together[row])
    longer = torch.where(torch.arange(SLOTS)[:, None] > positions[:, None, None, None], torch.nan, keys)
    assert torch.equal(cache_attention.attend_to_cache(q, longer, values, positions), together)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(cache_attention.attend_to_cache(q, keys, values, positions), together)
    finally:
        torch.set_num_threads(threads)


def test_a_model_that_diverged_is_seen() -> None:
    q, keys, values, positions = drawn(*SIZES[0], torch.bfloat16)
    q[0, 0, 0] = torch.nan
    found = cache_attention.attend_to_cache(q, keys, values, positions)
    assert found[0, 0].isnan().all() and not found[1:].isnan().any()


def test_without_a_compiler_or_a_folder_for_the_kernel_torchs_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for home, compilers in ((tmp_path, ()), (tmp_path / "file", building.COMPILERS)):
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setattr(building, "COMPILERS", compilers)
        monkeypatch.setattr(cache_attention, "_function", cache(cache_attention._function.__wrapped__))
        assert cache_attention.kernel(torch.float32, torch.device("cpu")) is None


def test_other_numbers_and_devices_take_torchs_kernel() -> None:
    assert cache_attention.kernel(torch.float64, torch.device("cpu")) is None
    assert cache_attention.kernel(torch.float32, torch.device("cuda")) is None
