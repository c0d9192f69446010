"""Attention: grouped key-value heads (GQA, Ainslie et al. 2023), and multi-head latent attention (DeepSeek-V2, 2024).

`ATTENTIONS` lists what a block can mix tokens by; the gated delta nets among them are in `delta_net.py`.

Both make queries, keys and values, rotate them, and leave the rest to `attend`, which computes scores and their softmax
within documents by the layer's `ScoreRule`. Shape letters: see `decoder.py`. Under tensor parallel N and K are this
rank's heads; under context parallel S is this rank's share of the sequence, and T is all of it.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

from configs.model import LayerConfig
from pretrain.model import attention_scores
from pretrain.model.attention_scores import ScoreRule, alibi_slopes
from pretrain.model.context import ForwardContext
from pretrain.model.delta_net import GatedDeltaNet
from pretrain.model.documents import Documents
from pretrain.model.kv_cache import KVCache
from pretrain.model.layer_context import LayerContext
from pretrain.model.layers import Norm, RMSNorm, is_recomputing, norm_of, normalized, recomputed
from pretrain.model.rotary import rotate, yarn_mscale
from pretrain.model.slices import Marks, TensorSplit, mark
from pretrain.model.tensor_parallel import ColumnLinear, Region, RowLinear, WholeLinear, columns

# (q [T, B, N, D], k and v [T, B, K, D], documents) to [T, B, N, D]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents | None], torch.Tensor]


class Attention(nn.Module):
    """The common part of both kinds of attention: applies the rule of scores to queries, keys and values."""

    def __init__(self, config: LayerConfig, context: LayerContext):
        super().__init__()
        self.config, self.layer, self.kind = config.attention, config.index, config.kind
        self.pairs = config.position.layout == "pairs"
        self.recompute = False  # True: the backward pass computes scores and softmax again, and none are stored
        # Context parallel puts its exchange of sequence for heads around this.
        self.attend: Attend = self.attend_here
        self.largest_logit: torch.Tensor | None = None  # the largest so far, in a step that measures it
        self.adapter = nn.ModuleDict()  # "prefix": keys and values before every document's, if there are any
        self.region = Region(context)
        self.query_factor = _query_factor(config)
        self.head_part = context.cp_rank, context.cp_size  # of this rank's heads, those that it has in `attend_here`
        own = slice(*(config.num_heads // context.tp_size * (context.tp_rank + i) for i in (0, 1)))
        self.register_buffer("slopes", None, persistent=False)
        if config.position.kind == "alibi":
            self.slopes = alibi_slopes(config.num_heads)[own].to(context.device)
        self.register_parameter("sinks", None)
        if config.attention.sinks:
            self.sinks = nn.Parameter(torch.empty(own.stop - own.start, dtype=context.dtype, device=context.device))
            split = TensorSplit(0, config.num_heads) if context.tp_size > 1 else None
            mark(self.sinks, Marks(split=split, decays=False))

    @property
    def rule(self) -> ScoreRule:
        """The rule by which `attend_here` makes weights from scores; under cp it sees a part of the heads."""
        return ScoreRule.of(self.config, self._part(self.slopes), self._part(self.sinks))

    def _part(self, of_heads: torch.Tensor | None) -> torch.Tensor | None:
        part, parts = self.head_part
        return of_heads if of_heads is None or parts == 1 else of_heads.chunk(parts)[part]

    def attend_here(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None, virtual: int = 0
    ) -> torch.Tensor:
        """Computes attention of this rank's heads over whole sequences; outputs are [T, B, N, D]."""
        if self.largest_logit is not None and not is_recomputing():
            found = attention_scores.largest_logit(q, k, documents, self.rule, virtual)
            self.largest_logit = torch.maximum(self.largest_logit, found)
        if self.recompute and torch.is_grad_enabled():
            return recomputed(attention_scores.attend, q, k, v, documents, self.rule, virtual)
        return attention_scores.attend(q, k, v, documents, self.rule, virtual)

    def over_documents(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """Computes attention within documents and to virtual tokens, which context parallel does not allow."""
        if context.virtual.count:
            return self.attend_here(q, k, v, context.documents, context.virtual.count)
        return self.attend(q, k, v, context.documents)

    def scored(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: ForwardContext, cache: KVCache | None
    ) -> torch.Tensor:
        """Computes attention of rotated queries to rotated keys, [S, B, N, D], over the cache if there is one."""
        if self.query_factor != 1.0:
            q = q * self.query_factor
        if "prefix" in self.adapter and not (cache is not None and cache.continues):
            k, v = self.adapter["prefix"](k, v)
        if cache is not None:
            return cache.attend(self.layer, q, k, v, self.rule)
        return self.over_documents(q, k, v, context)

    def rotated(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Rotates the heads [S, B, N, D] by their positions, if this kind of layer has rotary positions."""
        if self.kind not in context.rotary:
            return x
        return rotate(x, *context.rotary[self.kind], self.pairs)


class GroupedAttention(Attention):
    """Attention in which query heads share key-value heads; takes and gives hidden states [S, B, H]."""

    def __init__(self, config: LayerConfig, context: LayerContext):
        super().__init__(config, context)
        attention, hidden, self.head_dim = config.attention, config.hidden_size, config.head_dim
        size_q, size_kv = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        copies = max(1, context.tp_size // config.num_kv_heads)  # ranks with the same key-value head
        bias = attention.qkv_bias
        self.q_proj = ColumnLinear(hidden, size_q, context, bias=bias)
        self.k_proj = ColumnLinear(hidden, size_kv, context, copies, bias)
        self.v_proj = ColumnLinear(hidden, size_kv, context, copies, bias, config.inner_std_factor)
        self.o_proj = RowLinear(size_q, hidden, context, attention.output_bias, config.output_std_factor)
        if attention.output_gate:
            self.output_gate_proj = ColumnLinear(hidden, size_q, context, bias=bias)
        if attention.qk_norm == "head":
            self.q_norm: Norm = norm_of(config.norm, self.head_dim, context, partial="heads")
            self.k_norm: Norm = norm_of(config.norm, self.head_dim, context, partial="heads")
        elif attention.qk_norm == "projection":
            self.q_norm = SplitRMSNorm(size_q, 1, config.norm.eps, context)
            self.k_norm = SplitRMSNorm(size_kv, copies, config.norm.eps, context)
        self.eps = config.norm.eps

    def forward(self, x_SBH: torch.Tensor, context: ForwardContext, cache: KVCache | None = None) -> torch.Tensor:
        gating = (self.output_gate_proj,) if self.config.output_gate else ()
        q, k, v, *gate = columns(x_SBH, self.region, self.q_proj, self.k_proj, self.v_proj, *gating)
        if self.config.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (self._heads(x) for x in (q, k, v))
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotated(q, context), self.rotated(k, context)
        if self.config.qk_norm == "unweighted":
            q, k = normalized(q, self.eps).to(q.dtype), normalized(k, self.eps).to(k.dtype)
        if self.config.temperature is not None:
            q = q * self._temperature(context.positions_SB).to(q.dtype)
        y = self.scored(q, k, v, context, cache).flatten(2)
        return self.o_proj(y * torch.sigmoid(gate[0]) if gate else y)

    def _heads(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """Splits the last dimension into heads: [S, B, heads * D] to [S, B, heads, D]."""
        return x_SBH.unflatten(-1, (-1, self.head_dim))

    def _temperature(self, positions_SB: torch.Tensor) -> torch.Tensor:
        """Returns the factors on queries [S, B, 1, 1], which grow with the logarithm of the position (Llama 4)."""
        temperature = self.config.temperature
        assert temperature is not None
        steps = torch.floor((positions_SB.float() + 1) / temperature.floor)
        return (torch.log1p(steps) * temperature.scale + 1)[..., None, None]


class LatentAttention(Attention):
    """Multi-head latent attention: keys and values of all heads are made from one small vector a token.

    The projections to the small vectors are whole on every tensor-parallel rank; those from them to heads are split.
    """

    def __init__(self, config: LayerConfig, context: LayerContext):
        super().__init__(config, context)
        latent, hidden = config.attention.latent, config.hidden_size
        assert latent is not None
        self.latent, self.head_dim = latent, config.head_dim
        size_q, size_v = config.num_heads * config.head_dim, config.num_heads * latent.v_head_dim
        size_kv = config.num_heads * (latent.nope_head_dim + latent.v_head_dim)
        if latent.q_rank is None:
            self.q_proj = ColumnLinear(hidden, size_q, context)
        else:
            self.q_down_proj = WholeLinear(hidden, latent.q_rank, context)
            self.q_latent_norm = RMSNorm(latent.q_rank, latent.norm_eps, context)
            self.q_up_proj = ColumnLinear(latent.q_rank, size_q, context)
        self.kv_down_proj = WholeLinear(hidden, latent.kv_rank + latent.rope_head_dim, context)
        self.kv_latent_norm = RMSNorm(latent.kv_rank, latent.norm_eps, context)
        self.kv_up_proj = ColumnLinear(latent.kv_rank, size_kv, context)
        self.o_proj = RowLinear(size_v, hidden, context, config.attention.output_bias, config.output_std_factor)

    def forward(self, x_SBH: torch.Tensor, context: ForwardContext, cache: KVCache | None = None) -> torch.Tensor:
        latent, rope = self.latent, self.latent.rope_head_dim
        if latent.q_rank is None:
            (q,) = columns(x_SBH, self.region, self.q_proj)
        else:
            (q,) = columns(self.q_latent_norm(self.q_down_proj(x_SBH)), self.region, self.q_up_proj)
        q_nope, q_rope = q.unflatten(-1, (-1, self.head_dim)).split((latent.nope_head_dim, rope), dim=-1)
        q_rope = self.rotated(q_rope, context)
        down, k_rope = self.kv_down_proj(x_SBH).split((latent.kv_rank, rope), dim=-1)
        down = self.kv_latent_norm(down)
        k_rope = self.rotated(self.region.enter(k_rope)[:, :, None], context)  # one head, which all heads share
        if cache is not None:
            cache.put(self.layer, torch.cat((down[:, :, None], k_rope), dim=-1))
            if cache.continues:
                return self.o_proj(self._attend_stored(q_nope, q_rope, cache).flatten(2))
        (kv,) = columns(down, self.region, self.kv_up_proj)
        k_nope, v = kv.unflatten(-1, (-1, latent.nope_head_dim + latent.v_head_dim)).split(
            (latent.nope_head_dim, latent.v_head_dim), dim=-1
        )
        k = torch.cat((k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)), dim=-1)
        # Kernels take keys and values of one size: the smaller ones get zeros, and outputs lose them again.
        wide = max(self.head_dim, latent.v_head_dim)
        q = self._scaled(torch.cat((q_nope, q_rope), dim=-1), wide)
        q, k, v = (F.pad(x, (0, wide - x.shape[-1])) if x.shape[-1] < wide else x for x in (q, k, v))
        out = self.over_documents(q, k, v, context)[..., : latent.v_head_dim]
        return self.o_proj(out.flatten(2))

    def _attend_stored(self, q_nope: torch.Tensor, q_rope: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Computes attention of one token a row to stored latent vectors, from which no keys or values are made.

        A query times the weights that would make its head's keys meets the latent vectors themselves, and the weights
        that would make its values come after the sum (DeepSeek-V2, section 2.1.2).
        """
        latent = self.latent
        weight = self.kv_up_proj.weight.unflatten(0, (-1, latent.nope_head_dim + latent.v_head_dim))
        to_keys, to_values = weight.split((latent.nope_head_dim, latent.v_head_dim), dim=1)  # [N, D, latent]
        q = torch.cat((torch.einsum("sbnd,ndc->sbnc", q_nope, to_keys), q_rope), dim=-1)
        q = self._scaled(q, q.shape[-1])
        found = cache.attend_stored(self.layer, q, self.rule)[..., : latent.kv_rank]
        return torch.einsum("sbnc,ndc->sbnd", found, to_values)

    def _scaled(self, q: torch.Tensor, width: int) -> torch.Tensor:
        """Scales queries so that a kernel that divides scores by sqrt(width) divides them by sqrt(head_dim)."""
        factor = self.query_factor * math.sqrt(width / self.head_dim)
        return q if factor == 1.0 else q * factor


ATTENTIONS: dict[str, type[Attention] | type[GatedDeltaNet]] = {
    "grouped": GroupedAttention,
    "latent": LatentAttention,
    "delta": GatedDeltaNet,
}


def attention_of(config: LayerConfig, context: LayerContext) -> Attention | GatedDeltaNet:
    """Makes the attention of one layer, or the gated delta net in its place."""
    own = config.attention
    return ATTENTIONS["delta" if own.delta else "latent" if own.latent else "grouped"](config, context)


def _query_factor(config: LayerConfig) -> float:
    """Returns the factor on queries that a config adds to the usual 1 / sqrt(head_dim) of every score."""
    attention, scaling = config.attention, config.position.scaling
    factor = 1.0 if attention.scale is None else attention.scale * math.sqrt(config.head_dim)
    if attention.scale_by_layer:
        factor /= config.index + 1
    if attention.latent and scaling and scaling.kind == "yarn" and scaling.mscale_all_dim:
        factor *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return factor


class SplitRMSNorm(Norm):
    """RMSNorm over the heads of all tensor-parallel ranks together, of `size` elements in all (OLMo 2).

    The weight is split as the projection is. With `copies` every head is on so many neighbouring ranks.
    """

    def __init__(self, size: int, copies: int, eps: float, context: LayerContext):
        super().__init__(size * copies // context.tp_size, eps, context, partial="never")
        self.group, self.size, self.copies = context.tp, size, copies
        split = TensorSplit(0, size, copies) if context.tp_size > 1 else None
        mark(self.weight, Marks(split=split, constant=self.initial, decays=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide.square().sum(-1, keepdim=True)
        if self.group is not None:
            squares = _SumOverRanks.apply(squares, self.group) / self.copies
        return self.weight * (wide * torch.rsqrt(squares / self.size + self.eps)).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """Sums a tensor over ranks, and in the backward pass its gradient: every rank's output depends on all inputs."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
        ctx.group = group
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
