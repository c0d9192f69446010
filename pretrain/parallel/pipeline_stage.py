"""One pipeline rank's part of the model: a chunk of consecutive layers, or vpp chunks with an interleaved schedule.

Chunk c of pipeline rank p is virtual stage c * pp + p, so that a micro-batch passes every rank once before it returns
to the first (Narayanan et al. 2021, figure 4).
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from configs.layout import Layout
from pretrain.model import Decoder, StageSpec
from pretrain.model.decoder import Block
from pretrain.model.moe import MoE
from pretrain.model.slices import marks_of


def stage_specs(layout: Layout, pp_rank: int) -> list[StageSpec]:
    """Returns the part of the model that each chunk of a pipeline rank holds."""
    last = layout.pp * layout.vpp - 1
    virtual = [chunk * layout.pp + pp_rank for chunk in range(layout.vpp)]
    return [StageSpec(layout.layers_of_stage(v), v == 0, v == last) for v in virtual]


class PipelineStage(nn.Module):
    """The chunks of one pipeline rank as one module, for ZeRO; megatron-core's schedules run the `chunks` singly."""

    def __init__(self, chunks: Iterable[Decoder]):
        super().__init__()
        self._chunks = nn.ModuleList(chunks)

    @property
    def chunks(self) -> list[Decoder]:
        return [cast(Decoder, chunk) for chunk in self._chunks]

    @property
    def blocks(self) -> dict[int, Block]:
        """Blocks by global layer index."""
        return {layer: block for chunk in self.chunks for layer, block in chunk.blocks.items()}

    @property
    def moe_layers(self) -> dict[int, MoE]:
        return {layer: moe for chunk in self.chunks for layer, moe in chunk.moe_layers.items()}

    @property
    def vocabulary(self) -> list[nn.Parameter]:
        """The embedding and the output head, as far as this rank holds them."""
        first, last = self.chunks[0], self.chunks[-1]
        weights = [first.embedding.weight] if first.stage.is_first else []
        if last.embedding_copy is not None:
            weights.append(last.embedding_copy)
        own_head = hasattr(last, "lm_head") and last.lm_head.weight is not last.embedding_copy
        return weights + ([last.lm_head.weight] if own_head else [])

    @property
    def on_every_stage(self) -> list[list[nn.Parameter]]:
        """The copies, one in each chunk, of every weight that all pipeline stages hold."""
        copies: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_global_parameters():
            if marks_of(parameter).on_every_stage:
                copies.setdefault(name, []).append(parameter)
        return list(copies.values())

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the only chunk; a pipeline's schedule calls the chunks itself."""
        (chunk,) = self.chunks
        return chunk(*args, **kwargs)

    def named_global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (global name, parameter) of this rank's chunks; checkpoints and initial weights go by the name."""
        for chunk in self.chunks:
            yield from chunk.named_global_parameters()

    def named_balance(self) -> dict[str, torch.Tensor]:
        return {name: tensor for chunk in self.chunks for name, tensor in chunk.named_balance().items()}
