"""Attention within documents against a mask of tokens by tokens, over boundaries that are drawn at random."""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from configs.loader import validate
from configs.model import ModelConfig
from pretrain.model import Decoder, documents, init_weights
from pretrain.model.documents import Documents, attend_documents

HEADS, DIM = 4, 10


def drawn_rows(seed: int, rows: int = 3, length: int = 37) -> torch.Tensor:
    """Draws numbers of documents: rows of one document or several, that end or begin in padding or are nothing else."""
    draw = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(0, most, (), generator=draw))

    made = []
    for _ in range(rows):
        cuts = torch.randperm(length - 1, generator=draw)[: number(6)] + 1
        row = torch.zeros(length, dtype=torch.int64)
        for cut in cuts.tolist():
            row[cut:] += 1
        padding = (row >= number(7)) if number(2) else (row < number(3))
        made.append(row.masked_fill(padding, -1))
    if number(2):
        made[1] = made[0]  # rows cut alike are computed together
    return torch.stack(made)


def one_after_another(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, found: Documents) -> torch.Tensor:
    return documents.by_document(q, k, v, found, partial(documents.attend_rows, mask=None))


def by_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments_BT: torch.Tensor) -> torch.Tensor:
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same.tril()[:, None], enable_gqa=True).permute(2, 0, 1, 3)


def heads(segments_BT: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    rows, length = segments_BT.shape
    return [torch.randn(length, rows, n, DIM, dtype=dtype, requires_grad=True) for n in (HEADS, kv_heads, kv_heads)]


def check_same(attend: Any, segments_BT: torch.Tensor, kv_heads: int, dtype: torch.dtype, tolerance: float) -> None:
    qkv = heads(segments_BT, kv_heads, dtype)
    found, expected = attend(*qkv, Documents.of(segments_BT)), by_mask(*qkv, segments_BT)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    toward = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(found, qkv, toward), torch.autograd.grad(expected, qkv, toward), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("attend", [attend_documents, one_after_another])
def test_documents_are_attended_to_as_by_a_mask(attend: Any, seed: int) -> None:
    """Compares values around 1: fp32 rounds sums of 37 of them by some 1e-7, and in fp64 only an error would show."""
    segments_BT = drawn_rows(seed)
    for kv_heads in (HEADS, 2, 1):
        check_same(attend, segments_BT, kv_heads, torch.float32, 1e-6)
        check_same(attend, segments_BT, kv_heads, torch.float64, 1e-13)


def test_no_mask_of_tokens_by_tokens_is_made() -> None:
    """Attends in a row of 40,000 tokens in 400 documents, for which a mask would take 1.6 GB as bool."""
    segments_BT = (torch.arange(40_000) // 100)[None]
    q, k, v = (torch.zeros(40_000, 1, 1, 2, requires_grad=True) for _ in range(3))
    largest = 0

    class LargestResult(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    with LargestResult():
        attend_documents(q, k, v, Documents.of(segments_BT)).sum().backward()
    assert largest <= 4 * 40_000


def test_rows_that_are_cut_alike_are_one_block() -> None:
    cut = torch.tensor([0, 0, 0, 1, 1, -1])
    found = Documents.of(torch.stack([cut, cut, torch.zeros_like(cut), cut]))
    blocks = {tuple(block) for block in found.blocks.tolist()}
    spans = {(0, 3), (3, 5), (5, 6)}
    assert blocks == {(0, 2, *span) for span in spans} | {(2, 3, 0, 6)} | {(3, 4, *span) for span in spans}
    assert found.ends.tolist() == [0, 3, 5, 6, 9, 11, 12, 18, 21, 23, 24] and not found.is_whole
    assert Documents.of(torch.zeros(3, 5, dtype=torch.int64)).is_whole


@pytest.mark.parametrize(
    ("arguments", "causal"),
    [
        (("is_causal",), {"is_causal": True}),  # torch 2.10
        (("window_size",), {"window_size": (-1, 0)}),  # 2.11
        (("window_size", "enable_gqa"), {"window_size": (-1, 0)}),
    ],
)
def test_flash_attention_is_handed_the_documents_one_after_another(
    arguments: tuple[str, ...], causal: dict[str, Any]
) -> None:
    """Calls a stand-in for the kernel, which runs on GPUs alone, that computes what its documentation says."""

    def stand_in(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ends: torch.Tensor,
        ends_k: torch.Tensor,
        *most: int,
        **options: Any,
    ) -> torch.Tensor:
        grouped = {"enable_gqa": k.shape[1] != HEADS} if "enable_gqa" in arguments else {}
        assert options == causal | grouped and (grouped or k.shape[1] == v.shape[1] == HEADS)
        lengths = ends.diff().tolist()
        assert ends is ends_k and ends.dtype == torch.int32 and most == (37, 37) and max(lengths) <= 37
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([documents.attend_rows(*(x[:, None] for x in part), None)[:, 0] for part in parts])

    with mock.patch.multiple(documents, varlen_attn=stand_in, _VARLEN_ARGUMENTS=frozenset(arguments)):
        for kv_heads in (HEADS, 2):
            check_same(documents._by_varlen, drawn_rows(3), kv_heads, torch.float64, 1e-13)


def test_the_kernel_on_gpus_takes_these_arguments() -> None:
    assert {"window_size", "enable_gqa"} <= documents._VARLEN_ARGUMENTS


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_document_has_the_frequencies_of_its_own_length_in_any_row(kind: str) -> None:
    """Reads a short document packed into a row with a long one as it is read alone."""
    scaling: dict[str, Any] = {"kind": kind, "factor": 2.0, "original_length": 9}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 9.0]}
    sizes = {"vocab_size": 61, "num_layers": 2, "hidden_size": 24, "ffn_hidden_size": 32, "num_heads": 4}
    config = validate(ModelConfig, {**sizes, "num_kv_heads": 2, "init_std": 0.4, "position": {"scaling": scaling}})
    decoder = Decoder(config).eval()
    init_weights(decoder, seed=2)
    lengths = (5, 14, 9)
    texts = [torch.randint(0, 61, (1, length)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    segments = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None]
    with torch.no_grad():
        packed = decoder(torch.cat(texts, 1), positions, segments).split(lengths, 1)
        for text, found in zip(texts, packed, strict=True):
            alone = decoder(text, torch.arange(text.shape[1])[None])
            assert (found - alone).abs().max() < 1e-5
        # In a batch with a longer row, a padded row is read as alone, too.
        rows = torch.cat((F.pad(texts[0], (0, 9), value=3), texts[1]))
        valid = torch.tensor([[0] * 5 + [-1] * 9, [0] * 14])
        cache = decoder.new_cache(2, 14)
        padded = decoder(rows, torch.arange(14).expand(2, -1), valid, cache=cache)[:1, :5]
        assert (padded - packed[0]).abs().max() < 1e-5
