"""Context parallelism by DeepSpeed-Ulysses (Jacobs et al. 2023): each rank holds a part of every sequence.

All-to-alls before and after attention exchange a part of the sequence with all heads for the whole sequence with a part
of the heads, and back. Attention itself, within the documents of whole rows, computes the same as on one rank. Other
layers work token by token and need no exchange.

Key-value heads that do not divide by cp cannot be exchanged, above all where they are fewer. Keys and values of the
whole sequence are then gathered, every rank takes the heads that its query heads need, and only queries and outputs are
exchanged.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from deepspeed.sequence.layer import DistributedAttention, _SeqAllToAll

from pretrain.megatron import gather_from_sequence_parallel_region
from pretrain.model.attention import Attend
from pretrain.model.batch import Batch
from pretrain.model.delta_net import GatedDeltaNet, MixTokens
from pretrain.model.documents import Documents
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage

HEADS, SEQUENCE, BATCH = 2, 0, 1  # dimensions of q, k and v, which are [S, B, heads, D]


def exchange_around_attention(stage: PipelineStage, mesh: Mesh) -> None:
    """Wraps the attention of every layer in the exchange; does nothing at cp=1."""
    if mesh.layout.cp == 1:
        return
    for block in stage.blocks.values():
        if isinstance(block.attention, GatedDeltaNet):
            block.attention.mix = _exchanging_features(block.attention.mix, mesh)
        else:
            block.attention.attend = _exchanging(block.attention.attend, mesh)


def _exchanging(attend: Attend, mesh: Mesh) -> Attend:
    distributed = DistributedAttention(attend, mesh.cp_group, scatter_idx=HEADS, gather_idx=SEQUENCE)

    def attend_across(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents | None) -> torch.Tensor:
        num_heads, num_kv_heads = q.shape[HEADS], k.shape[HEADS]
        if num_kv_heads % mesh.layout.cp == 0:
            return distributed(q, k, v, BATCH, None, documents)
        # The gradient is this rank's part of each token's; it is summed and given to the rank that has the token.
        both = gather_from_sequence_parallel_region(torch.cat((k, v), HEADS), True, mesh.cp_group)
        k, v = (needed_heads(x, num_heads, mesh.layout.cp, mesh.cp_rank) for x in both.chunk(2, HEADS))
        q = _exchange(q, HEADS, SEQUENCE, num_heads, mesh)
        return _exchange(attend(q, k, v, documents), SEQUENCE, HEADS, num_heads, mesh)

    return attend_across


def _exchanging_features(mix: MixTokens, mesh: Mesh) -> MixTokens:
    """Exchanges what a gated delta net has of each key head, which cp divides, and its outputs."""

    def mix_across(features: torch.Tensor, documents_TB: torch.Tensor | None) -> torch.Tensor:
        heads = features.shape[HEADS]
        features = _exchange(features.contiguous(), HEADS, SEQUENCE, heads, mesh)
        return _exchange(mix(features, documents_TB).contiguous(), SEQUENCE, HEADS, heads, mesh)

    return mix_across


def needed_heads(x: torch.Tensor, num_heads: int, parts: int, part: int) -> torch.Tensor:
    """Returns those of all key-value heads [T, B, K, D] that one of `parts` equal parts of the query heads needs.

    Query heads that share one get it once, except where they do not share evenly: then each gets its own copy.
    """
    queries, sharing = num_heads // parts, num_heads // x.shape[HEADS]
    if queries % sharing == 0 or sharing % queries == 0:
        return x.narrow(HEADS, part * queries // sharing, max(1, queries // sharing))
    return x.repeat_interleave(sharing, HEADS).narrow(HEADS, part * queries, queries)


def _exchange(x: torch.Tensor, scatter: int, gather: int, num_heads: int, mesh: Mesh) -> torch.Tensor:
    """Gives every rank a part of dimension `scatter` and the whole of `gather`; all ranks have `num_heads` heads."""
    return _SeqAllToAll.apply(mesh.cp_group, x, scatter, gather, BATCH, None, None, "", True, num_heads)


def own_parts(batches: Sequence[Batch], mesh: Mesh) -> list[Batch]:
    """Cuts this rank's part, consecutive tokens, out of every sequence of the batches.

    Their `documents` stay those of whole rows, which attention sees.
    """
    cp, rank = mesh.layout.cp, mesh.cp_rank
    if cp == 1:
        return list(batches)

    def part(batch: Batch) -> Batch:
        names = ("tokens", "labels", "loss_mask", "positions", "segments", "lengths")
        own: dict[str, Any] = {name: cut(getattr(batch, name)) for name in names}
        trained = own["loss_mask"].flatten().nonzero()[:, 0]
        own |= {"trained": trained, "extra": {name: cut(t) for name, t in batch.extra.items()}}
        own["experts"] = None if batch.experts is None else cut(batch.experts)
        return replace(batch, **own, ahead=tuple(ahead.part(cut) for ahead in batch.ahead))

    def cut(tensor_BS: torch.Tensor) -> torch.Tensor:
        return tensor_BS.chunk(cp, dim=1)[rank].contiguous()

    return [part(batch) for batch in batches]
