"""The backward pass of attention in C++ against fp64, beside torch's own; without a compiler torch's is used."""

import pytest
import torch
from torch.nn import functional as F

from pretrain.model import native
from pretrain.model.documents import Documents, attend_documents, attend_rows
from pretrain.model.native import building

HAS_AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))
# Rows of the numbers of their tokens' documents: one token, an odd number, several blocks of keys and of queries.
PACKED = [[0] + [1] * 129 + [2] * 70 + [-1] * 3, [0] * 203]
Gradients = list[torch.Tensor]


def gradients(kind: str, inputs: Gradients, weights: torch.Tensor, segments: torch.Tensor | None) -> Gradients:
    """Gradients of q, k and v [T, B, heads, D] in bf16, or by matrices of scores in fp64."""
    dtype = torch.float64 if kind == "fp64" else torch.bfloat16
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    q, k, v = leaves
    if kind == "fp64":
        rows = torch.zeros(q.shape[1], len(q)) if segments is None else segments
        mask = (rows[:, :, None] == rows[:, None, :]).tril()[:, None]
        by_head = [x.permute(1, 2, 0, 3) for x in leaves]
        attend = F.scaled_dot_product_attention
        out = attend(by_head[0], by_head[1], by_head[2], mask, enable_gqa=True).permute(2, 0, 1, 3)
    elif segments is None:
        out = attend_rows(q, k, v, None)
    else:
        out = attend_documents(q, k, v, Documents.of(segments))
    # Not contiguous in the backward pass either.
    (out.transpose(0, 1).to(dtype) * weights.to(dtype).transpose(0, 1)).sum().backward()
    return [x.grad.double() for x in leaves if x.grad is not None]


def errors(found: Gradients, expected: Gradients) -> list[float]:
    return [float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True)]


@pytest.mark.full
@pytest.mark.skipif(not HAS_AMX, reason="the processor has no matrix units for bf16")
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 64), (6, 2, 6)])
@pytest.mark.parametrize("segments", [None, torch.tensor(PACKED)], ids=["whole", "packed"])
def test_gradients_are_closer_to_exact_ones_than_those_of_torch(
    heads: int, kv_heads: int, size: int, segments: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compares errors with torch's: a rounding to bf16 changes a number by up to 2^-8, often by 1.7e-3."""
    assert native.load()
    draw = torch.Generator().manual_seed(5)
    shapes = [(203, 2, n, size) for n in (heads, kv_heads, kv_heads, heads)]
    *inputs, weights = (torch.randn(shape, generator=draw).bfloat16() for shape in shapes)
    exact = gradients("fp64", inputs, weights, segments)
    ours = errors(gradients("ours", inputs, weights, segments), exact)
    compiled = torch.compile(gradients, backend="aot_eager")("ours", inputs, weights, segments)
    assert errors(compiled, exact) == ours
    monkeypatch.setattr(native, "_loaded", set())
    theirs = errors(gradients("torch", inputs, weights, segments), exact)
    assert ours != theirs
    for own, other in zip(ours, theirs, strict=True):
        assert own <= min(3.5e-3, 1.02 * other)


@pytest.mark.skipif(not HAS_AMX, reason="the processor has no matrix units for bf16")
def test_without_a_compiler_kernels_of_torch_are_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "_loaded", set())
    monkeypatch.setattr(native, "FLAGS", ("--flag-that-no-compiler-has",))  # another library than any that is there
    assert not native.load() and not native.is_loaded()
    monkeypatch.setattr(building, "COMPILERS", ())
    assert not native.load() and not native.is_loaded()
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("attention in bf16 takes torch's slower kernel: causal_backward.cpp was not built (")
    assert "there is no C++ compiler; install one of" in second
