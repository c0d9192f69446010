"""The key-value cache of generation, and attention over it. Shape letters: see `decoder.py`.

What a row gets does not depend on the rows beside it: a row's token at position p is in slot p whatever the others'
lengths, and attention reads a multiple of `SLOTS` slots, so that the sums over a row's keys are taken in the same order
whatever the longest row is.
"""

import torch
import torch.nn.functional as F

from configs.model import ModelConfig
from pretrain.model.scores import ScoreRule, attend, attend_cached

SLOTS = 16  # fp32 numbers in the widest vector register of a CPU


def whole_slots(length: int) -> int:
    """Returns the least multiple of `SLOTS` that is at least `length`."""
    return -(-length // SLOTS) * SLOTS


class KVCache:
    """Keys and values of earlier tokens: slot p of a row holds those of its token at position p.

    A forward pass with several tokens a row starts rows, each with its first token first and padding last. A forward
    pass with one token a row continues rows, each at its own position; before it the caller sets `longest`.
    """

    def __init__(self, config: ModelConfig, rows: int, max_length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, 2, rows, config.num_kv_heads, whole_slots(max_length), config.dim_per_head)
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.longest = 0  # tokens in the longest row that the next forward pass continues
        self._positions_B: torch.Tensor | None = None  # of the tokens that continue rows; None while rows are started
        self._mask = self.store

    def begin(self, positions_BS: torch.Tensor) -> None:
        """Prepares for a forward pass of tokens at these positions."""
        self._positions_B = None
        if positions_BS.shape[1] > 1:
            return
        self._positions_B = positions_BS[:, 0]
        slots = torch.arange(whole_slots(self.longest + 1), device=positions_BS.device)
        mask = torch.zeros(len(positions_BS), len(slots), dtype=self.store.dtype, device=self.store.device)
        self._mask = mask.masked_fill_(slots > positions_BS, float("-inf"))[:, None, None]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
        """Stores keys and values [S, B, K, D], and computes attention [S, B, N, D] of q to its row so far."""
        tokens, rows = q.shape[:2]
        if self._positions_B is None:
            self.store[layer, 0, :rows, :, :tokens] = k.permute(1, 2, 0, 3)
            self.store[layer, 1, :rows, :, :tokens] = v.permute(1, 2, 0, 3)
            return attend(q, k, v, None, rule)
        own = torch.arange(rows, device=q.device)
        keys, values = self.store[layer, :, :rows].unbind()
        keys[own, :, self._positions_B], values[own, :, self._positions_B] = k[0], v[0]
        slots = self._mask.shape[-1]
        if not rule.is_plain(slots):
            return attend_cached(q[0], keys[:, :, :slots], values[:, :, :slots], self._positions_B, rule)[None]
        # The query heads that share a key-value head see the same keys, so they go where several tokens would.
        heads = q[0].unflatten(1, (k.shape[2], -1))
        out = F.scaled_dot_product_attention(heads, keys[:, :, :slots], values[:, :, :slots], attn_mask=self._mask)
        return out.flatten(1, 2)[None]

    def copy_rows(self, first: int, other: "KVCache", rows: torch.Tensor) -> None:
        """Copies `rows` of another cache, which may be a shorter one, to this one's rows from `first` on."""
        length = min(self.store.shape[4], other.store.shape[4])
        self.store[:, :, first : first + len(rows), :, :length] = other.store[:, :, rows, :, :length]

    def move_rows(self, rows: torch.Tensor, to: torch.Tensor) -> None:
        """Copies `rows` over the rows `to`."""
        self.store[:, :, to] = self.store[:, :, rows]
