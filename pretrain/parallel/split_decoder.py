"""A decoder for sampling whose weights are split over ranks: each layer's over tp, and experts over ep.

All ranks sample the same texts. Each computes its heads and its slice of the vocabulary, and the logits are gathered on
all of them, which so draw the same tokens. There is no pipeline.
"""

import torch
import torch.distributed as dist
from torch import nn

from configs.adapters import AdapterConfig
from configs.model import ModelConfig
from pretrain.model import Decoder, LayerContext
from pretrain.model.adapters import add_adapters
from pretrain.model.kv_cache import KVCache
from pretrain.model.moe.router import Router
from pretrain.parallel.groups import Mesh


class SplitDecoder(nn.Module):
    """One rank's part of a whole model; called like a `Decoder`, it gives the logits of the whole vocabulary."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor] | None,
        mesh: Mesh,
        dtype: torch.dtype,
        adapter: AdapterConfig | None = None,
    ):
        """Builds this rank's part from whole tensors by global name; with None the caller fills its parameters.

        With an `adapter` it has the adapters' parameters, too. Raises ValueError if the tensors do not fit the model.
        """
        super().__init__()
        layout = mesh.layout
        assert layout.pp == layout.cp == 1 and not layout.sp, "generation splits weights alone"
        context = LayerContext(dtype=dtype, device=mesh.device, tp=mesh.tp_group, ep=mesh.ep_group)
        self.decoder, self.config, self.mesh = Decoder(config, context=context).eval(), config, mesh
        if adapter is not None:
            add_adapters(self.decoder, adapter, context)
        if weights is not None:
            self._load(weights)

    @torch.no_grad()
    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        slices, parameters = self.mesh.slices, dict(self.decoder.named_global_parameters())
        balance = self.decoder.named_balance()
        if parameters.keys() | balance.keys() != weights.keys():
            other = sorted((parameters.keys() | balance.keys()) ^ weights.keys())
            raise ValueError(f"the weights are of another model: {other[:3]} are in one of the two only")
        for name, tensor in balance.items():
            tensor.copy_(weights[name])
        for name, parameter in parameters.items():
            whole = slices.global_shape(parameter)
            if weights[name].shape != whole:
                raise ValueError(f"{name} is {tuple(weights[name].shape)} in the weights, {whole} in the model")
            parameter.copy_(slices.cut(weights[name], parameter))

    def forward(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        segments_BS: torch.Tensor | None = None,
        cache: KVCache | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes logits [B, S, V], or [N, V] at the positions `wanted`; the same bits on all ranks."""
        part = self.decoder(tokens_BS, positions_BS, segments_BS, cache, wanted).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.mesh.layout.tp)]
        dist.all_gather(parts, part, group=self.mesh.tp_group)
        logits = torch.cat(parts, -1)[..., : self.config.vocab_size]
        if self.mesh.layout.ep > 1:  # ranks with other experts may have added the same numbers in another order
            logits = logits.contiguous()
            dist.broadcast(logits, group=self.mesh.ep_group, group_src=0)
        return logits

    @property
    def routers(self) -> list[Router]:
        """The routers in the order of their layers; each rank has all of them whole."""
        return self.decoder.routers

    def new_cache(self, rows: int, max_length: int) -> KVCache:
        """Makes an empty cache for the key-value heads of this rank, and for its heads of gated delta nets."""
        tp, attention = self.mesh.layout.tp, self.config.attention
        if delta := attention.delta:
            own = {name: getattr(delta, name) // tp for name in ("num_key_heads", "num_value_heads")}
            attention = attention.model_copy(update={"delta": delta.model_copy(update=own)})
        heads = max(1, self.config.num_kv_heads // tp)
        config = self.config.model_copy(update={"num_kv_heads": heads, "attention": attention})
        weight = self.decoder.embedding.weight
        return KVCache(config, rows, max_length, weight.dtype, weight.device, self.decoder.virtual.count)
