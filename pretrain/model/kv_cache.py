"""The key-value cache of generation, and attention over it. Shape letters: see `decoder.py`.

What a row gets does not depend on the rows beside it: a row's token at position p is in slot p whatever the others'
lengths, and our own kernel reads its tokens alone, those of a prompt that several rows begin with in one of these.
Where SDPA's is used (`native.cache_attention`), attention reads a multiple of `SLOTS` slots, so that the sums over a
row's keys are taken in the same order whatever the longest row is.
"""

import numpy as np
import torch
import torch.nn.functional as F

from configs.model import ModelConfig
from pretrain.model.attention_scores import ScoreRule, attend, attend_cached
from pretrain.model.delta_states import DeltaStates
from pretrain.model.documents import Documents
from pretrain.model.native import cache_attention
from pretrain.model.native.cache_attention import SharedTokens

Tables = dict[str, tuple[torch.Tensor, torch.Tensor]]  # cos and sin [S, B, 1, rotated elements] by the kind of a layer
SLOTS = 16  # fp32 numbers in the widest vector register of a CPU


def whole_slots(length: int) -> int:
    """Returns the least multiple of `SLOTS` that is at least `length`."""
    return -(-length // SLOTS) * SLOTS


class KVCache:
    """Keys and values of earlier tokens: slot p of a row holds those of its token at position p.

    Virtual tokens, `virtual` of them, come before a row's first token and have the first positions. Of latent attention
    it holds the latent vectors and the rotated keys that all heads share, in place of both, and of a gated delta net
    the states of rows (`DeltaStates`).

    A forward pass with several tokens a row starts rows, each with its first token first and padding last. A forward
    pass with one token a row continues rows, each at its own position; before it the caller sets `longest`.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        virtual: int = 0,
    ):
        self.virtual, slots = virtual, whole_slots(max_length + virtual)
        storing = [layer.index for layer in config.layers if not layer.attention.delta]
        if latent := config.attention.latent:
            shape = (len(storing), 1, rows, 1, slots, latent.kv_rank + latent.rope_head_dim)
        else:
            shape = (len(storing), 2, rows, config.num_kv_heads, slots, config.dim_per_head)
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self.longest = 0  # tokens in the longest row that the next forward pass continues
        self.tables = Tables()  # rotary tables of every slot, which whoever makes the first of them puts here
        # Views are made once: for a small model on a CPU making them takes longer than what they are made for.
        self._stored = dict(zip(storing, (layer.unbind(0) for layer in self.store.unbind(0)), strict=True))
        self._flat = {layer: [part.view(-1, shape[-1]) for part in parts] for layer, parts in self._stored.items()}
        self._deltas = {
            layer.index: DeltaStates(layer.attention.delta, rows, dtype, device)
            for layer in config.layers
            if layer.attention.delta
        }
        self._heads = torch.arange(rows * shape[3], device=device).view(rows, shape[3]) * slots
        self._positions_B: torch.Tensor | None = None  # of the tokens that continue rows; None while rows are started
        self._new, self._slots = self.store, 0
        self._kernel = cache_attention.kernel(dtype, device)
        # Rows that were copied from one row have its origin, and its first tokens in common.
        self._origin, self._common = np.arange(rows), np.zeros(rows, dtype=np.int64)
        self._shared: SharedTokens | None = None  # for the rows that were continued last
        self._mask: torch.Tensor | None = None  # of what SDPA's kernel sees
        self._documents: Documents | None = None

    @property
    def slots(self) -> int:
        """The number of tokens that a row has room for."""
        return self.store.shape[4]

    def begin(self, positions_BS: torch.Tensor, documents: Documents | None = None) -> None:
        """Prepares for a forward pass of tokens at these positions, which count virtual tokens.

        `documents` have contexts, if layers see any.
        """
        self._positions_B, self._documents = None, documents
        if positions_BS.shape[1] > 1:
            return
        self._positions_B = positions_BS[:, 0]
        self._new = (self._heads[: len(positions_BS)] + positions_BS).flatten()  # in `_flat`
        self._slots, self._mask = whole_slots(self.virtual + self.longest + 1), None
        if self._kernel is not None and not torch.is_grad_enabled():
            rows = len(positions_BS)
            if self._shared is None or len(self._shared.order_B) != rows:
                self._shared = SharedTokens.of(self._origin[:rows], self._common[:rows])
            return
        slots = torch.arange(self._slots, device=positions_BS.device)
        mask = torch.zeros(len(positions_BS), len(slots), dtype=self.store.dtype, device=self.store.device)
        self._mask = mask.masked_fill_(slots > positions_BS, float("-inf"))[:, None, None]

    @property
    def continues(self) -> bool:
        """Whether the forward pass continues rows, so that its tokens attend to what is stored."""
        return self._positions_B is not None

    def put(self, layer: int, *stored: torch.Tensor) -> None:
        """Stores the keys and values [S, B, K, D] of this forward pass, or latent vectors in place of both."""
        if self._positions_B is not None:
            for flat, x in zip(self._flat[layer], stored, strict=True):
                flat.index_copy_(0, self._new, x.flatten(0, 2))
            return
        tokens, rows = stored[0].shape[:2]
        for store, x in zip(self._stored[layer], stored, strict=True):
            store[:rows, :, :tokens] = x.permute(1, 2, 0, 3)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
        """Stores keys and values [S, B, K, D], and computes attention [S, B, N, D] of q to its row so far."""
        if self.continues and self._mask is None and rule.is_plain(self._slots):
            return self._by_kernel(layer, q, (k[0], v[0]))
        self.put(layer, k, v)
        return self.attend_stored(layer, q, rule) if self.continues else attend(q, k, v, self._documents, rule)

    def _by_kernel(
        self, layer: int, q: torch.Tensor, new: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        assert self._kernel is not None
        keys, values = self._stored[layer][0], self._stored[layer][-1]
        return self._kernel(q[0], keys, values, self._positions_B, self._shared, new)[None]

    def attend_stored(self, layer: int, q: torch.Tensor, rule: ScoreRule) -> torch.Tensor:
        """Computes attention of the tokens [1, B, N, D] that continue rows; latent vectors are keys and values both."""
        assert self._positions_B is not None
        is_plain = rule.is_plain(self._slots)
        if is_plain and self._mask is None:
            return self._by_kernel(layer, q)
        keys, values = self._stored[layer][0], self._stored[layer][-1]
        keys, values = (x[: q.shape[1], :, : self._slots] for x in (keys, values))
        if not is_plain:
            return attend_cached(q[0], keys, values, self._positions_B, rule)[None]
        # The query heads that share a key-value head see the same keys, so they go where several tokens would.
        heads = q[0].unflatten(1, (keys.shape[1], -1))
        out = F.scaled_dot_product_attention(heads, keys, values, attn_mask=self._mask)
        return out.flatten(1, 2)[None]

    def delta_states(self, layer: int) -> DeltaStates:
        """The states of rows in a layer that is a gated delta net."""
        return self._deltas[layer]

    def copy_rows(self, first: int, other: "KVCache", rows: torch.Tensor, lengths: torch.Tensor) -> None:
        """Copies `rows` of another cache, which may be a shorter one, to this one's rows from `first` on.

        `lengths` are the tokens of each. Rows that are copies of one share these tokens.
        """
        end, length = first + len(rows), min(self.store.shape[4], other.store.shape[4])
        self.store[:, :, first:end, :, :length] = other.store[:, :, rows, :, :length]
        for layer, states in self._deltas.items():
            states.copy_rows(first, other.delta_states(layer), rows)
        self._origin[first:end] = self._origin.max() + 1 + rows.cpu().numpy()
        self._common[first:end] = self.virtual + lengths.cpu().numpy()
        self._shared = None

    def move_rows(self, rows: torch.Tensor, to: torch.Tensor) -> None:
        """Copies what is stored of `rows` to the rows `to` of the same cache."""
        self.store[:, :, to] = self.store[:, :, rows]
        for states in self._deltas.values():
            states.move_rows(rows, to)
        for known in (self._origin, self._common):
            known[to.cpu().numpy()] = known[rows.cpu().numpy()]
        self._shared = None
