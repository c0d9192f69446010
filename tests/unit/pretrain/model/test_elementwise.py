"""The kernels of norm and rotation against torch's operations in fp64, and where they leave the work to these."""

import shutil

import pytest
import torch

from pretrain.model.layers import _scaled
from pretrain.model.native import building, elementwise
from pretrain.model.rotary import _turned

pytestmark = pytest.mark.skipif(not any(map(shutil.which, building.COMPILERS)), reason="there is no C++ compiler")
SHAPES = [(1, 32, 4, 32), (3, 5, 2, 6), (64, 9, 8, 64)]  # S, B, N, D; the last is worth several threads


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", elementwise.DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_rotation_are_those_of_torch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    x, weight = drawn(*shape, dtype=dtype), drawn(shape[-1], dtype=dtype)
    half = drawn(*shape[:2], 1, shape[-1] // 2, dtype=torch.float32)
    cos, sin = (torch.cat((part, part), dim=-1).to(dtype) for part in (half.cos(), half.sin()))
    try:
        torch.set_num_threads(threads)
        normed, turned = elementwise.rms_norm(x, weight, 1e-5), elementwise.rotate_halves(x, cos, sin)
    finally:
        torch.set_num_threads(before)
    assert normed is not None and turned is not None
    for name in ("rms_norm", "rotate_halves"):
        monkeypatch.setattr(elementwise, name, lambda *_: None)  # so that torch computes
    if dtype == torch.bfloat16:
        assert torch.equal(turned, _turned(x, cos, sin, 1.0)), "it is rounded where torch rounds"
    wide = [one.double() for one in (x, weight, cos, sin)]
    exact = *_scaled(wide[0], wide[1], 1e-5), _turned(wide[0], wide[2], wide[3], 1.0)
    rounding = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-21  # of two roundings, and in fp32 of a sum's
    for found, right in zip((*normed, turned), exact, strict=True):
        assert (found.double() - right).abs().max() <= rounding * right.abs().max()


def test_other_tensors_are_left_to_torch() -> None:
    x, weight = drawn(2, 3, 4, 8, dtype=torch.float32), drawn(8, dtype=torch.float32)
    assert elementwise.rms_norm(x.double(), weight.double(), 1e-5) is None
    assert elementwise.rms_norm(x.transpose(0, 1), weight, 1e-5) is None
    assert elementwise.rms_norm(x, weight.bfloat16(), 1e-5) is None
    angles = drawn(1, 1, 1, 8, dtype=torch.float32)
    assert elementwise.rotate_halves(x, angles, angles) is None, "one angle for several tokens"
    nan = elementwise.rms_norm(torch.full_like(x, torch.nan), weight, 1e-5)
    assert nan is not None and nan[0].isnan().all()
