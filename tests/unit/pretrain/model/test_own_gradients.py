"""Functions with gradients of their own compute what the formulas that autograd derives do, forward and backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from configs.model_parts import PositionConfig
from pretrain.model import LayerContext
from pretrain.model import cache_parts as parts_module
from pretrain.model.layers import RMSNorm
from pretrain.model.rotary import rotary_angles, rotate
from pretrain.model.tensor_parallel import ColumnLinear, Region, columns

SHAPES = [(7, 2, 3, 8), (1, 1, 1, 2), (64, 3, 2, 16)]


def differ(found: Callable[..., Any], right: Callable[..., Any], *inputs: torch.Tensor) -> float:
    """Returns the largest difference of outputs and gradients of inputs, relative to the largest element of each."""
    generator = torch.Generator().manual_seed(1)
    results: list[list[torch.Tensor]] = []
    for function in (found, right):
        own = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*own)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator.manual_seed(1)
        loss = sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs)
        results.append([*(y.detach() for y in outputs), *torch.autograd.grad(loss, own)])  # type: ignore[arg-type]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


@pytest.fixture(params=[2**17, 1, 100], ids=["whole", "row_by_row", "parts"], autouse=True)
def part_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "ELEMENTS", request.param)
    torch.manual_seed(0)  # with two elements a gradient can cancel almost wholly, and then has no precise bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    norm = RMSNorm(shape[-1], 1e-5, LayerContext(dtype=dtype))

    def found(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def right(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))

    x, weight = torch.randn(shape, dtype=dtype) * scale, torch.randn(shape[-1], dtype=dtype)
    assert differ(found, right, x, weight) < (3e-6 if dtype == torch.float32 else 1e-14)


def test_norm_rounds_to_bf16_as_seldom_as_can_be() -> None:
    """Counts roundings: outputs are rounded twice, before and after the weight, and gradients once, by 2^-8 at most."""
    norm, eps = RMSNorm(16, 1e-5, LayerContext(dtype=torch.bfloat16)), 1e-5
    x, grad = torch.randn(2, 64, 3, 16).bfloat16().unbind()
    weight = torch.rand(16).bfloat16() + 1
    found = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    outputs = torch.func.functional_call(norm, {"weight": found[1]}, (found[0],))
    outputs.backward(grad)
    wide = exact[1] * (exact[0] * torch.rsqrt(exact[0].square().mean(-1, keepdim=True) + eps))
    wide.backward(grad.double())
    assert float(((outputs - wide) / wide).detach().abs().max()) < 2 * 2**-8
    for own, right in zip(found, exact, strict=True):
        assert own.grad is not None and right.grad is not None
        error = (own.grad.double() - right.grad).abs() / right.grad.abs().clamp(min=1e-2)  # where terms do not cancel
        assert float(error.max()) < 2**-8 + 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation(shape: tuple[int, ...]) -> None:
    positions = torch.arange(shape[0]).expand(shape[1], -1) * 37
    angles = rotary_angles(positions, PositionConfig(), shape[-1], positions)
    cos, sin = (table.double() for table in angles)

    def right(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    assert differ(lambda x: rotate(x, cos, sin), right, torch.randn(shape, dtype=torch.float64)) < 1e-14


def test_columns() -> None:
    context = LayerContext(dtype=torch.float64)
    layers = [ColumnLinear(6, size, context) for size in (4, 10, 2)]
    x, *weights = torch.randn(5, 3, 6).double(), *(torch.randn(layer.weight.shape).double() for layer in layers)

    def found(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for layer, weight in zip(layers, weights, strict=True):
            del layer.weight
            layer.__dict__["weight"] = weight
        return columns(x, Region(context), *layers)

    assert differ(found, lambda x, *ws: tuple(F.linear(x, w) for w in ws), x, *weights) < 1e-14
