"""The kernel of attention to the key-value cache against fp64, beside SDPA's; and that rows do not see one another."""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
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
        q_alone, keys_alone, values_alone, at = (x[row : row + 1] for x in (q, keys, values, positions))
        alone = cache_attention.attend_to_cache(q_alone, keys_alone, values_alone, at)
        assert torch.equal(alone[0], together[row])
    longer = torch.where(torch.arange(SLOTS)[:, None] > positions[:, None, None, None], torch.nan, keys)
    assert torch.equal(cache_attention.attend_to_cache(q, longer, values, positions), together)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(cache_attention.attend_to_cache(q, keys, values, positions), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", cache_attention.DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [SIZES[0], (9, 1, 3, 6)], ids=str)
def test_tokens_that_rows_share_are_read_in_one_of_them(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    q, keys, values, positions = drawn(*sizes, dtype)
    # Rows 1, 4 and 7 begin with the same 10 tokens, and rows 2 and 3 with the same 20; row 3 is at the 5th of them.
    positions[torch.tensor([1, 2, 3, 4, 7])] = torch.tensor([10, 30, 4, 47, 12])
    origins, counts = np.array([0, 1, 2, 2, 1, 5, 6, 1, 8]), np.array([0, 10, 20, 20, 10, 0, 0, 10, 0])
    for x in (keys, values):
        x[[4, 7], :, :10], x[3, :, :20] = x[1, :, :10].clone(), x[2, :, :20].clone()
    alone = cache_attention.attend_to_cache(q, keys, values, positions)
    for x in (keys, values):  # what is read in the first row of each is not read in the others
        x[[4, 7], :, :10], x[3, :, :5] = torch.nan, torch.nan
    shared = cache_attention.SharedTokens.of(origins, counts)
    assert torch.equal(cache_attention.attend_to_cache(q, keys, values, positions, shared), alone)


def test_new_keys_and_values_are_stored_and_seen() -> None:
    q, keys, values, positions = drawn(*SIZES[0], torch.float32)
    stored, rows = cache_attention.attend_to_cache(q, keys, values, positions), torch.arange(len(q))
    new = keys[rows, :, positions].clone(), values[rows, :, positions].clone()
    before = keys.clone(), values.clone()
    keys[rows, :, positions] = values[rows, :, positions] = torch.nan
    assert torch.equal(cache_attention.attend_to_cache(q, keys, values, positions, new=new), stored)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


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
        monkeypatch.setattr(cache_attention, "plain_library", building.plain_library.__wrapped__)
        monkeypatch.setattr(cache_attention, "_function", cache(cache_attention._function.__wrapped__))
        assert cache_attention.kernel(torch.float32, torch.device("cpu")) is None


def test_other_numbers_and_devices_take_torchs_kernel() -> None:
    assert cache_attention.kernel(torch.float64, torch.device("cpu")) is None
    assert cache_attention.kernel(torch.float32, torch.device("cuda")) is None
