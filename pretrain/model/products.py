"""Matrix products of bf16 numbers, on CPUs that multiply fp32 faster than bf16.

Intel's server processors multiply bf16 fast in their matrix units (AMX). Virtual machines often hide these, and what is
left is a vector instruction that multiplies as many numbers a cycle as those for fp32 do, in kernels that reach less of
it. There both matrices are widened to fp32, and the sums are rounded to bf16 once, as a kernel for bf16 does.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pretrain.model.cache_parts import in_parts

LEAST_SIZE = 128  # of each of a product's three sizes; below it, widening takes longer than it saves


def _multiplies_fp32_faster() -> bool:
    """Tells whether the processor is one of Intel's later ones, without AMX.

    Facts of the processor decide, and no measurement, so that a resumed run computes the same numbers.
    """
    has = torch.cpu.get_capabilities()
    # The first processors of Intel with bf16 (Cooper Lake, without fp16) multiply twice as many in bf16, as AMD's do.
    return bool(has.get("avx512_fp16")) and not has.get("amx_bf16") and _is_intel()


def _is_intel() -> bool:
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "GenuineIntel" in facts.read_text(encoding="utf-8")


_WIDENS = _multiplies_fp32_faster()


def widens() -> bool:
    """Tells whether this process multiplies bf16 on a CPU by way of fp32."""
    return _WIDENS


def multiplies_bf16_fast() -> bool:
    """Tells whether this CPU multiplies bf16 faster than fp32."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16")) and not _multiplies_fp32_faster()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Computes x Wᵀ + b, as `F.linear` does, of x [..., in] and W [out, in]."""
    rows = x.numel() // max(1, x.shape[-1])
    if not _is_widened(x, rows, *weight.shape):
        return F.linear(x, weight, bias)
    by_row = x.reshape(rows, -1)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        y: torch.Tensor = _widened_linear(by_row, weight)
    else:
        y = product(by_row, weight.t())
    y = y.view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


def widened(a: torch.Tensor) -> torch.Tensor:
    """Returns a matrix as products take it, so that several products of it widen it once."""
    return a.float() if _is_widened(a, *a.shape) else a


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Computes a b of matrices, which may be `widened`, in the precision `dtype`, or in that of a.

    Autograd does not see it.
    """
    dtype = a.dtype if dtype is None else dtype
    if a.dtype == b.dtype and not _is_widened(a, *a.shape, b.shape[1]):
        return (a @ b).to(dtype)
    return (a.float() @ b.float()).to(dtype)


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes a b to `out`; autograd does not see it."""
    if _is_widened(a, *a.shape, b.shape[1]):
        return out.copy_(a.float() @ b.float())
    return torch.mm(a, b, out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adds a b to `total`, which may be of higher precision, and returns it; autograd does not see it."""
    if a.dtype != b.dtype or _is_widened(a, *a.shape, b.shape[1]):
        if total.dtype == torch.float32:
            return total.addmm_(a.float(), b.float())
        return total.copy_(total.float().addmm_(a.float(), b.float()))
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    for sums, parts in in_parts(total, a @ b):
        sums += parts  # a CPU first makes a copy in fp32
    return total


def _is_widened(a: torch.Tensor, *sizes: int) -> bool:
    return a.dtype == torch.bfloat16 and a.device.type == "cpu" and widens() and min(sizes) >= LEAST_SIZE


# An operator of its own, since the compiler would put the widened matrices among what the backward pass needs. It keeps
# the weight itself, and no view of it, so that ZeRO-3 can take the weight away between the passes.
@torch.library.custom_op("trivium::widened_linear", mutates_args=())
def _widened_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (x.float() @ weight.float().t()).to(x.dtype)


@_widened_linear.register_fake
def _empty(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(len(x), len(weight))


def _keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    x, weight = ctx.saved_tensors
    grad_x = product(grad, weight) if ctx.needs_input_grad[0] else None
    grad_weight = product(grad.t(), x) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight


_widened_linear.register_autograd(_backward, setup_context=_keep)
