"""Context parallelism by DeepSpeed-Ulysses (Jacobs et al. 2023): each rank holds a part of every sequence.

All-to-alls before and after attention exchange a part of the sequence with all heads for the whole sequence with a part
of the heads, and back. Attention itself, within the documents of whole rows, computes the same as on one rank. Other
layers work token by token and need no exchange.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from deepspeed.sequence.layer import DistributedAttention

from pretrain.model.attention import Attend, Pattern
from pretrain.model.batch import Batch
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage

HEADS, SEQUENCE, BATCH = 2, 0, 1  # dimensions of q, k and v, which are [S, B, heads, D]


def exchange_around_attention(stage: PipelineStage, mesh: Mesh) -> None:
    """Wraps the attention of every layer in the exchange; does nothing at cp=1."""
    if mesh.layout.cp == 1:
        return
    for block in stage.blocks.values():
        block.attention.attend = _exchanging(block.attention.attend, mesh)


def _exchanging(attend: Attend, mesh: Mesh) -> Attend:
    distributed = DistributedAttention(attend, mesh.cp_group, scatter_idx=HEADS, gather_idx=SEQUENCE)

    def attend_across(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern) -> torch.Tensor:
        return distributed(q, k, v, BATCH, None, pattern)

    return attend_across


def own_parts(batches: Sequence[Batch], mesh: Mesh) -> list[Batch]:
    """Cuts this rank's part, consecutive tokens, out of every sequence of the batches.

    Their `documents` stay those of whole rows, which attention sees.
    """
    cp, rank = mesh.layout.cp, mesh.cp_rank
    if cp == 1:
        return list(batches)

    def part(batch: Batch) -> Batch:
        names = ("tokens", "labels", "loss_mask", "positions", "segments", "advantages", "logprobs")
        tensors = {name: getattr(batch, name) for name in names}
        own = {name: t.chunk(cp, dim=1)[rank].contiguous() for name, t in tensors.items() if t is not None}
        trained = own["loss_mask"].flatten().nonzero()[:, 0]
        return replace(batch, **own, trained=trained)

    return [part(batch) for batch in batches]
