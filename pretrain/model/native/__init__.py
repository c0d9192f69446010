"""Kernels in C++ for CPUs, compiled where they are first used; where that fails, SDPA's kernels stay in use.

`causal_backward.cpp` is the backward pass of causal attention in bf16. SDPA's own takes as long in bf16 as in fp32,
five to ten times its forward pass. Only runs that compile their blocks use it, since they need a C++ compiler anyway,
and it is kept with what torch.compile makes. The other kernel is in `cache_attention`.
"""

import sys
from pathlib import Path

import torch

from pretrain.model.native.building import built

SOURCE = Path(__file__).parent / "causal_backward.cpp"
# The instructions of every processor that multiplies bf16. The rest lets the compiler make vectors of rounding.
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
INSTRUCTIONS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
LIBRARIES = ("c10", "torch_cpu")

_loaded: set[str] = set()  # names of kernels that can be used in this process


def load() -> bool:
    """Builds the kernels if they are not there yet, and loads them; returns whether they can be used.

    If they cannot be built on a processor that could run them, one line on stderr says why.
    """
    if is_loaded():
        return True
    has = torch.cpu.get_capabilities()
    if not (has.get("avx512_bf16") or has.get("amx_bf16")):
        return False
    try:
        torch.ops.load_library(str(_built()))
        if torch.ops.trivium_native.is_supported():
            _loaded.add("causal_backward")
        return is_loaded()
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        print(f"attention in bf16 takes torch's slower kernel: {SOURCE.name} was not built ({reason})", file=sys.stderr)
        return False


def is_loaded() -> bool:
    """Returns whether `load` has succeeded in this process."""
    return "causal_backward" in _loaded


def causal_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    blocks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Computes the gradients of q [T, B, N, D] and of k and v [T, B, K, D] within documents.

    `logsumexp` [B, N, T] is that of the scaled scores, and `blocks` are those of `pretrain.model.documents.Documents`.
    All but these two are in bf16.
    """
    whole = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad, q, k, v, out))
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.trivium_native.causal_backward(
        *whole, logsumexp.contiguous(), blocks
    )
    return found


def _built() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils.cpp_extension import include_paths, library_paths

    folders = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    flags = (*FLAGS, *INSTRUCTIONS, abi, *folders)
    return built(SOURCE, flags, LIBRARIES, Path(cache_dir(), "trivium"), torch.__version__)
