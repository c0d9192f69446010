"""Products of bf16 by way of fp32 against fp64: beside torch's, with gradients, compiled, and in attention."""

import pytest
import torch
import torch.nn.functional as F

from configs.train import Precision
from pretrain.model import documents, products
from pretrain.model.documents import attend_rows
from pretrain.model.layer_context import LayerContext
from pretrain.model.tensor_parallel import ColumnLinear, Region, columns
from pretrain.precision import choose_dtype

ROUNDING = 2.0**-8  # of a number to bf16
CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["widened", "direct"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (products, documents):
        monkeypatch.setattr(module, "widens", lambda: request.param)


def drawn(*shape: int, of: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(of)).bfloat16()


def is_near(found: torch.Tensor, exact: torch.Tensor, roundings: int = 1) -> bool:
    return bool((found.double() - exact).abs().max() <= roundings * ROUNDING * exact.abs().max())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [1, 200])  # too few to be widened, and enough
def test_a_linear_layer_and_its_gradients_are_exact_but_for_one_rounding(rows: int) -> None:
    inputs = drawn(2, rows, 136, of=1), drawn(152, 136, of=2), drawn(152, of=3)
    grad = drawn(2, rows, 152, of=4)
    leaves = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    y, right = products.linear(leaves[0], leaves[1], leaves[2]), F.linear(exact[0], exact[1], exact[2])
    y.backward(grad)
    right.backward(grad.double())
    assert is_near(y, right, roundings=2)  # of the product, and of its sum with the bias
    for leaf, wide in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and wide.grad is not None
        assert is_near(leaf.grad, wide.grad) and leaf.grad.stride() == wide.grad.stride()
    with torch.no_grad():
        assert torch.equal(products.linear(*inputs), y)


def test_a_weight_that_is_taken_away_between_the_passes_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes it away as ZeRO-3 does; the backward pass finds the weight that is there by then."""
    monkeypatch.setattr(products, "widens", lambda: True)
    x, weight = drawn(128, 128, of=1).requires_grad_(), drawn(128, 128, of=2).requires_grad_()
    y = products.linear(x, weight)
    weight.data = drawn(128, 128, of=3)
    y.backward(drawn(128, 128, of=4))
    assert x.grad is not None and is_near(x.grad, drawn(128, 128, of=4).double() @ drawn(128, 128, of=3).double())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("total", [torch.bfloat16, torch.float32], ids=str)
def test_a_product_is_written_and_added(total: torch.dtype) -> None:
    a, b, before = drawn(160, 144, of=1), drawn(144, 136, of=2), drawn(160, 136, of=3).to(total)
    exact = a.double() @ b.double()
    out = torch.full((160, 200), torch.nan, dtype=torch.bfloat16)[:, :136]
    assert products.multiply(a, b, out) is out and is_near(out, exact)
    summed = before.clone()
    assert products.add_product(summed, a, b) is summed
    assert is_near(summed, before.double() + exact, roundings=2)  # of the product, and of the sum


def test_a_frozen_weight_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "widens", lambda: True)
    x, weight = drawn(128, 128, of=1).requires_grad_(), drawn(128, 128, of=2)
    computed = []

    def counted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        computed.append((a, b))
        return a @ b

    y = products.linear(x, weight)
    monkeypatch.setattr(products, "product", counted)
    y.sum().backward()
    assert len(computed) == 1 and x.grad is not None


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("size", [8, 144])  # of the second weight: too small to be widened, and large enough
def test_column_layers_of_one_input_are_exact_but_for_roundings(size: int) -> None:
    context = LayerContext(dtype=torch.bfloat16)
    layers = ColumnLinear(136, 152, context), ColumnLinear(136, size, context)
    x = drawn(2, 80, 136, of=1).requires_grad_()
    for number, layer in enumerate(layers):
        layer.weight.data = drawn(*layer.weight.shape, of=10 + number)
    grads = [drawn(2, 80, len(layer.weight), of=20 + number) for number, layer in enumerate(layers)]
    leaves = [x, *(layer.weight for layer in layers)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    outputs, right = columns(x, Region(context), *layers), [F.linear(exact[0], weight) for weight in exact[1:]]
    torch.autograd.backward(outputs, grads)
    torch.autograd.backward(right, [grad.double() for grad in grads])
    assert all(is_near(found, y) for found, y in zip(outputs, right, strict=True))
    for leaf, wide in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and wide.grad is not None and leaf.grad.dtype == torch.bfloat16
        assert is_near(leaf.grad, wide.grad, roundings=3)  # of two products, and of their sum


def test_only_large_products_of_bf16_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "widens", lambda: True)
    wide = drawn(128, 128, of=1)
    assert products._is_widened(wide, 128, 128, 128) and not products._is_widened(wide, 127, 128, 128)
    assert not products._is_widened(wide.float(), 128, 128, 128)
    assert not products._is_widened(torch.empty(1, dtype=torch.bfloat16, device="meta"), 128, 128, 128)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_and_its_gradients_are_as_near_as_roundings_allow(kv_heads: int) -> None:
    inputs = drawn(40, 2, 4, 16, of=1), drawn(40, 2, kv_heads, 16, of=2), drawn(40, 2, kv_heads, 16, of=3)
    leaves = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    found, right = attend_rows(leaves[0], leaves[1], leaves[2], None), attend_rows(exact[0], exact[1], exact[2], None)
    found.sum().backward()
    right.sum().backward()
    assert is_near(found, right, roundings=2) and found.dtype == torch.bfloat16
    for leaf, wide in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and wide.grad is not None
        assert is_near(leaf.grad, wide.grad, roundings=8)  # torch's kernel for bf16 rounds weights and their gradients


@pytest.mark.parametrize(
    ("flags", "vendor", "widened", "auto"),
    [
        (("avx512_bf16", "avx512_fp16", "amx_bf16"), "GenuineIntel", False, torch.bfloat16),
        (("avx512_bf16", "avx512_fp16"), "GenuineIntel", True, torch.float32),
        (("avx512_bf16", "avx512_fp16"), "AuthenticAMD", False, torch.bfloat16),
        (("avx512_bf16",), "GenuineIntel", False, torch.bfloat16),
        (("avx2",), "GenuineIntel", False, torch.float32),
    ],
)
def test_the_processor_decides(
    flags: tuple[str, ...], vendor: str, widened: bool, auto: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(flags, True))
    monkeypatch.setattr(products, "_is_intel", lambda: vendor == "GenuineIntel")
    assert products._multiplies_fp32_faster() == widened
    assert choose_dtype(Precision.AUTO, CPU) == auto and choose_dtype(Precision.BF16, CPU) == torch.bfloat16
