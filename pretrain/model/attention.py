"""Causal attention with grouped key-value heads (GQA, Ainslie et al. 2023), rotary positions and packed documents.

With `qk_norm` the queries and keys of each head are normalized before the rotary embedding rotates them (Qwen3;
Henry et al. 2020).

Shape letters here and in the rest of `model/`: S sequence, B batch, H hidden, N query heads, K key-value heads,
D head dimension. Under tensor parallel N and K are this rank's heads. Activations between layers are [S, B, H], the
layout of megatron-core's pipeline. Under context parallel S is this rank's share of the sequence, and T is all of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from configs.model import ModelConfig
from pretrain.model.batch import Batch
from pretrain.model.documents import Documents, attend_documents, attend_rows
from pretrain.model.kv_cache import KVCache
from pretrain.model.layer_context import LayerContext
from pretrain.model.linear import ColumnLinear, Region, RowLinear, columns
from pretrain.model.norm import RMSNorm
from pretrain.model.recompute import recomputed
from pretrain.model.rope import rotary_angles, rotate

# What a query may attend to: earlier tokens of its document, or with a tensor [B, 1, queries, keys] of bool the keys
# where it is True. None stands for all earlier tokens.
Pattern = Documents | torch.Tensor | None


@dataclass(frozen=True)
class ForwardContext:
    """Everything that all layers share in the forward pass of one micro-batch, the chunks of a pipeline included.

    `valid_SB` is False for padding; None means that there is none. `samples` [B], on the host, are the numbers of
    the rows in the training run, from which dropout draws its masks.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    pattern: Pattern
    valid_SB: torch.Tensor | None = None
    samples: torch.Tensor | None = None

    @classmethod
    def of_batch(cls, config: ModelConfig, batch: Batch) -> "ForwardContext":
        """Makes the context of a training batch; under context parallel its documents are those of whole rows."""
        cos, sin = rotary_angles(batch.positions, config.dim_per_head, config.rope_theta)
        samples = None if batch.samples is None else torch.tensor(batch.samples)
        return cls(cos, sin, batch.documents, (batch.segments >= 0).t(), samples)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        positions_BS: torch.Tensor,
        segments_BS: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> "ForwardContext":
        """Makes the context of whole rows; -1 in `segments_BS` is padding, and None means one document a row.

        With a cache, which says itself what a query may attend to, `segments_BS` only tells padding.
        """
        cos, sin = rotary_angles(positions_BS, config.dim_per_head, config.rope_theta)
        valid_SB = None if segments_BS is None else (segments_BS >= 0).t()
        if cache is not None:
            cache.begin(positions_BS)
            return cls(cos, sin, None, valid_SB)
        return cls(cos, sin, None if segments_BS is None else Documents.of(segments_BS), valid_SB)


# (q [T, B, N, D], k and v [T, B, K, D], pattern) to [T, B, N, D]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Pattern], torch.Tensor]


class Attention(nn.Module):
    """The attention of one layer; takes and gives hidden states [S, B, H]."""

    def __init__(self, config: ModelConfig, layer: int, context: LayerContext):
        super().__init__()
        self.layer, self.head_dim = layer, config.dim_per_head
        self.recompute = False  # True: the backward pass computes scores and softmax again, and none are stored
        # Context parallel puts its exchange of sequence for heads around this.
        self.attend: Attend = self.attend_here
        self.region = Region(context)
        size_q, size_kv = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = ColumnLinear(config.hidden_size, size_q, context)
        copies = max(1, context.tp_size // config.num_kv_heads)  # ranks with the same key-value head
        self.k_proj = ColumnLinear(config.hidden_size, size_kv, context, copies)
        self.v_proj = ColumnLinear(config.hidden_size, size_kv, context, copies)
        self.o_proj = RowLinear(size_q, config.hidden_size, context)
        self.has_qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps, context.dtype, context.device)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps, context.dtype, context.device)

    def forward(self, x_SBH: torch.Tensor, context: ForwardContext, cache: KVCache | None = None) -> torch.Tensor:
        projected = columns(x_SBH, self.region, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (self._heads(x_SBH) for x_SBH in projected)
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
        attended = self.attend(q, k, v, context.pattern) if cache is None else cache.attend(self.layer, q, k, v)
        return self.o_proj(attended.flatten(2))

    def attend_here(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        """Computes attention of this rank's heads over whole sequences; outputs are [T, B, N, D]."""
        if self.recompute and torch.is_grad_enabled():
            return recomputed(_attend, q, k, v, pattern)
        return _attend(q, k, v, pattern)

    def _heads(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """Splits the last dimension into heads: [S, B, heads * D] to [S, B, heads, D]."""
        return x_SBH.unflatten(-1, (-1, self.head_dim))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    if isinstance(pattern, Documents):
        return attend_documents(q, k, v, pattern)
    return attend_rows(q, k, v, pattern)
