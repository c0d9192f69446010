"""Causal attention with grouped key-value heads (GQA, Ainslie et al. 2023), rotary positions and document masks.

Shape letters here and in the rest of `model/`: S sequence, B batch, H hidden, N query heads, K key-value heads,
D head dimension. Under tensor parallel N and K are this rank's heads. Activations between layers are [S, B, H], the
layout of megatron-core's pipeline.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from configs.train import ModelConfig
from pretrain.model.linear import ColumnLinear, Region, RowLinear
from pretrain.model.megatron import ModelParallelConfig
from pretrain.model.rope import rotary_angles, rotate


class KVCache:
    """Keys and values of all positions so far, for generation: per layer [B, K, max_length, D]."""

    def __init__(self, config: ModelConfig, batch: int, max_length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, 2, batch, config.num_kv_heads, max_length, config.dim_per_head)
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0
        # Which of the positions so far hold a real token; left padding does not.
        self.valid_BT = torch.zeros(batch, max_length, dtype=torch.bool, device=device)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + k.shape[2]
        self.store[layer, 0, :, :, self.length : end] = k
        self.store[layer, 1, :, :, self.length : end] = v
        return self.store[layer, 0, :, :, :end], self.store[layer, 1, :, :, :end]


@dataclass
class AttentionInputs:
    """What all layers of one forward pass share: rotary angles and the mask, made once.

    `mask` is [B, 1, S, T] bool, True where query s may see key t; None means plainly causal, which lets SDPA take its
    flash kernel.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        positions_BS: torch.Tensor,
        segments_BS: torch.Tensor | None,
        cache: KVCache | None = None,
    ) -> "AttentionInputs":
        cos, sin = rotary_angles(positions_BS, config.dim_per_head, config.rope_theta)
        length = positions_BS.shape[1]
        if cache is not None:
            start, end = cache.length, cache.length + length
            cache.valid_BT[:, start:end] = True if segments_BS is None else segments_BS >= 0
            steps = torch.arange(end, device=positions_BS.device)
            causal = steps[start:, None] >= steps[None, :]
            # A padding query sees itself, so that no softmax is over nothing.
            own = steps[start:, None] == steps[None, :]
            return cls(cos, sin, ((causal & cache.valid_BT[:, None, :end]) | own)[:, None])
        if segments_BS is None:
            return cls(cos, sin, None)
        causal = torch.ones(length, length, dtype=torch.bool, device=positions_BS.device).tril()
        same = segments_BS[:, :, None] == segments_BS[:, None, :]
        return cls(cos, sin, (same & causal)[:, None])


class Attention(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        layer_config: ModelParallelConfig,
        tp_group: ProcessGroup | None,
    ):
        super().__init__()
        self.layer, self.head_dim = layer, config.dim_per_head
        self.recompute = False  # scores and softmax are computed again in the backward pass, not kept
        self.region = Region(layer_config, tp_group)
        size_q, size_kv = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = ColumnLinear(config.hidden_size, size_q, layer_config, tp_group)
        self.k_proj = ColumnLinear(config.hidden_size, size_kv, layer_config, tp_group)
        self.v_proj = ColumnLinear(config.hidden_size, size_kv, layer_config, tp_group)
        self.o_proj = RowLinear(size_q, config.hidden_size, layer_config, tp_group)

    def forward(self, x_SBH: torch.Tensor, inputs: AttentionInputs, cache: KVCache | None = None) -> torch.Tensor:
        x_SBH = self.region.enter(x_SBH)
        q = rotate(self._heads(self.q_proj(x_SBH)), inputs.cos, inputs.sin)
        k = rotate(self._heads(self.k_proj(x_SBH)), inputs.cos, inputs.sin)
        v = self._heads(self.v_proj(x_SBH))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        if self.recompute and torch.is_grad_enabled():
            out_BNSD = checkpoint(_attend, q, k, v, inputs.mask, use_reentrant=False)
        else:
            out_BNSD = _attend(q, k, v, inputs.mask)
        return self.o_proj(out_BNSD.permute(2, 0, 1, 3).flatten(2))

    def _heads(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """[S, B, heads * D] to [B, heads, S, D]."""
        return x_SBH.unflatten(-1, (-1, self.head_dim)).permute(1, 2, 0, 3)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[B, N, S, D], [B, K, T, D] twice to [B, N, S, D]."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)
