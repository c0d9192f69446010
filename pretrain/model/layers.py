"""The small parts of a block: norms, feed-forward networks, dropout, and recomputation of activations.

`NORMS` and `ACTIVATIONS` list the kinds that a config can name. Shape letters: see `decoder.py`.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from configs.model import LayerConfig
from configs.model_parts import NormConfig
from configs.model_size import is_gated
from pretrain.model.cache_parts import in_parts
from pretrain.model.layer_context import LayerContext
from pretrain.model.native import elementwise
from pretrain.model.slices import Marks, Partial, mark
from pretrain.model.tensor_parallel import ColumnLinear, Region, RowLinear, columns


class Norm(nn.Module):
    """A norm of the last dimension, of `size` elements, with a weight for each.

    `partial` says when a tensor-parallel rank has only a part of the weight's gradient (see `slices.Marks`). The
    default is for norms of hidden states, of whose sequence each rank sees a part under sequence parallel.
    """

    initial = 1.0  # of every weight

    def __init__(self, size: int, eps: float, context: LayerContext, partial: Partial = "sequence"):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=context.dtype, device=context.device))
        mark(self.weight, Marks(partial=partial, constant=self.initial, decays=False))

    @property
    def factor(self) -> torch.Tensor:
        """The tensor that normalized elements are multiplied by."""
        return self.weight


class RMSNorm(Norm):
    """RMSNorm (Zhang and Sennrich 2019): x / rms(x) * weight, the statistics in fp32 or better."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == self.weight.dtype and not torch.compiler.is_compiling():
            if not torch.is_grad_enabled():
                return _scaled(x, self.weight, self.eps)[0]
            return _Normalized.apply(x, self.weight, self.eps)
        return self.weight * normalized(x, self.eps).to(x.dtype)


class RMSNormPlusOne(Norm):
    """RMSNorm whose factor is one plus the weight, multiplied before rounding to the input's precision (Gemma)."""

    initial = 0.0

    @property
    def factor(self) -> torch.Tensor:
        return 1 + self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = normalized(x, self.eps)
        return (scaled * (1 + self.weight.to(scaled.dtype))).to(x.dtype)


class LayerNorm(Norm):
    """LayerNorm (Ba et al. 2016): (x - mean) / sqrt(variance + eps) * weight + bias."""

    def __init__(self, size: int, eps: float, context: LayerContext, partial: Partial = "sequence"):
        super().__init__(size, eps, context, partial)
        self.bias = nn.Parameter(torch.empty(size, dtype=context.dtype, device=context.device))
        mark(self.bias, Marks(partial=partial, constant=0.0, decays=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


NORMS: dict[str, type[Norm]] = {"rms": RMSNorm, "rms_plus_one": RMSNormPlusOne, "layer": LayerNorm}


def norm_of(config: NormConfig, size: int, context: LayerContext, partial: Partial = "sequence") -> Norm:
    """Makes the norm that a config describes."""
    return NORMS[config.kind](size, config.eps, context, partial)


def normalized(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Returns `x` divided by the root mean square of its last dimension, computed in fp32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _scaled(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns normalized elements times the weight, and the factor [..., 1] by which each vector was normalized."""
    if (found := elementwise.rms_norm(x, weight, eps)) is not None:
        return found
    y = torch.empty_like(x)
    factor = torch.empty_like(x[..., :1], dtype=torch.promote_types(x.dtype, torch.float32))
    for x_part, y_part, factor_part in in_parts(x, y, factor):
        wide_part = x_part.to(factor.dtype)
        torch.linalg.vector_norm(wide_part, dim=-1, keepdim=True, out=factor_part)
        factor_part.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        if wide_part is x_part:
            torch.mul(x_part, factor_part, out=y_part)
        else:
            y_part.copy_(wide_part.mul_(factor_part))
        y_part.mul_(weight)
    return y, factor


class _Normalized(torch.autograd.Function):
    """Computes RMSNorm in fp32 or fp64; stores each input vector and one number of it for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, factor = _scaled(x, weight, eps)
        ctx.save_for_backward(x, weight, factor)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, factor = ctx.saved_tensors
        wide = factor.dtype
        grad_x, grad_weight, wide_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=wide), weight.to(wide)
        for own_grad, x_part, factor_part, grad_x_part in in_parts(grad, x, factor, grad_x):
            normed, own_grad = x_part.to(wide) * factor_part, own_grad.to(wide)
            grad_weight += (own_grad * normed).flatten(0, -2).sum(0)
            weighted = torch.mul(own_grad, wide_weight, out=grad_x_part if grad_x_part.dtype == wide else None)
            along = (weighted * normed).mean(-1, keepdim=True)
            weighted.addcmul_(normed, along, value=-1).mul_(factor_part)
            if weighted is not grad_x_part:
                grad_x_part.copy_(weighted)
        return grad_x, grad_weight.to(weight.dtype), None


CLAMP_LIMIT, CLAMP_SLOPE = 7.0, 1.702  # of gpt-oss


def _clamped_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Computes the activation of gpt-oss: a SwiGLU of clamped inputs whose linear half has one added."""
    gate, up = gate.clamp(max=CLAMP_LIMIT), up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT)
    return gate * torch.sigmoid(CLAMP_SLOPE * gate) * (up + 1)


# From the outputs of the gate and up projections, or of the up projection alone, to the input of the down projection.
ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "geglu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "clamped_swiglu": _clamped_swiglu,
    "gelu": F.gelu,
    "gelu_tanh": lambda up: F.gelu(up, approximate="tanh"),
    "relu": F.relu,
}


class MLP(nn.Module):
    """The feed-forward part of a block, of inner size `size`: down(activation(gate(x), up(x))) (Shazeer 2020).

    Takes and gives hidden states [S, B, H].
    """

    def __init__(self, config: LayerConfig, size: int, context: LayerContext):
        super().__init__()
        self.region, bias = Region(context), config.mlp.bias
        self.is_gated, self.activation = is_gated(config.mlp.kind), ACTIVATIONS[config.mlp.kind]
        std_factor = config.inner_std_factor
        if self.is_gated:
            self.gate_proj = ColumnLinear(config.hidden_size, size, context, bias=bias, std_factor=std_factor)
        self.up_proj = ColumnLinear(config.hidden_size, size, context, bias=bias, std_factor=std_factor)
        self.down_proj = RowLinear(size, config.hidden_size, context, bias, config.output_std_factor)

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        inputs = (self.gate_proj, self.up_proj) if self.is_gated else (self.up_proj,)
        return self.down_proj(self.activation(*columns(x_SBH, self.region, *inputs)))


class Dropout(nn.Module):
    """Sets a share `context.dropout` of hidden states to zero in training and scales up the rest (Srivastava 2014).

    The mask is a function of (seed, layer name, sample) and of nothing else. There is no random state: every layout
    draws the same mask, each rank takes its part of it, and activations that are computed again get the same mask
    again. `name` is the global name of the layer, the same in every layout.
    """

    def __init__(self, name: str, context: LayerContext):
        super().__init__()
        self.name, self.rate, self.seed = name, context.dropout, context.seed
        self.part, self.parts = context.sequence_part

    def forward(self, x_SBH: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
        """Applies the masks of the rows numbered `samples` in the run; S is this rank's part of the sequence."""
        if not (self.training and self.rate):
            return x_SBH
        assert samples is not None, "dropout is keyed by sample"
        key = f"{self.seed}/{self.name}"
        mask = kept(x_SBH.detach(), samples, key, self.rate, self.part, self.parts)
        return x_SBH * mask.to(x_SBH.dtype) / (1 - self.rate)


# An operator of its own, so that compiled code sees numbers of samples as a tensor and is not built anew for others.
@torch.library.custom_op("trivium::dropout_kept", mutates_args=())
def kept(like: torch.Tensor, samples: torch.Tensor, key: str, rate: float, part: int, parts: int) -> torch.Tensor:
    """Draws which elements of `like` [S, B, H] dropout keeps, by the rows' numbers `samples` [B] on the host."""
    length, _, hidden = like.shape
    masks = []
    for sample in samples.numpy().tolist():
        digest = hashlib.sha256(f"{key}/{sample}".encode()).digest()
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        whole = torch.rand(length * parts, hidden, generator=generator, device=like.device) >= rate
        masks.append(whole.chunk(parts)[part])
    return torch.stack(masks, dim=1)


@kept.register_fake
def _all_kept(like: torch.Tensor, samples: torch.Tensor, key: str, rate: float, part: int, parts: int) -> torch.Tensor:
    return torch.empty_like(like, dtype=torch.bool, memory_format=torch.contiguous_format)


def recomputed(function: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
    """Calls `function(*inputs)` and stores the inputs alone; the backward pass calls it again (Chen et al. 2016)."""
    # Nothing in the model draws from the global random state, so none is kept.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def is_recomputing() -> bool:
    """Whether a backward pass computes activations again now, so that code must not count a second time."""
    return torch._C._current_autograd_node() is not None
