"""Sums gradients of which several ranks hold a part and which ZeRO does not sum: after backward, before ZeRO's step.

- Embeddings that the last pipeline stage uses too, since they are tied to its head, or for multi-token prediction: the
  first and the last stage each hold a copy. Both copies get the sum and so stay equal; the last stage's is marked, so
  that the grad norm counts it once.
- Norm weights under sequence parallel: every tensor-parallel rank holds the whole weight but sees only its part of the
  sequence (Korthikanti et al. 2022). QK-norm weights at tp>1: every rank sees only its own heads. The grad norm counts
  such weights on the first tensor-parallel rank alone, so the sum is all that is needed.
- Keys' and values' weights where there are fewer key-value heads than tensor-parallel ranks: each head is on several of
  them, and each sees only its own query heads. All get the sum, and the grad norm counts the first one's alone.
- Weights that every pipeline stage holds: each uses its copy for its own layers. All copies get the sum, and the grad
  norm counts the first one's alone.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from pretrain.megatron import parallel_state
from pretrain.model.slices import marks_of
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage
from pretrain.parallel.zero import gradient, set_gradient


def mark_copies(stage: PipelineStage, mesh: Mesh) -> None:
    """Marks copies, of a tied embedding or a key-value head, so that DeepSpeed leaves them out of the grad norm."""
    for parameter in stage.parameters():
        if not mesh.is_first_copy(parameter):
            vars(parameter)["tensor_model_parallel"] = False  # counted then on the first tensor-parallel rank alone
    for copies in stage.on_every_stage:
        for parameter in copies[1 if mesh.pp_rank == 0 else 0 :]:
            vars(parameter)["ds_pipe_replicated"] = True
    if (copy := stage.chunks[-1].embedding_copy) is not None:
        vars(copy)["ds_pipe_replicated"] = True


def sum_partial(stage: PipelineStage, mesh: Mesh) -> None:
    """Sums partial gradients over tensor-parallel ranks, and those of shared embeddings over first and last stage."""
    whole = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    always = ("sequence", "heads") if mesh.layout.sp else ("heads",) if mesh.layout.tp > 1 else ()
    _sum([p for p in whole if marks_of(p).partial in always], mesh.tp_group)
    if mesh.kv_group is not None:
        splits = {id(p): marks_of(p).split for p in whole}
        _sum([p for p in whole if (split := splits[id(p)]) and split.copies > 1], mesh.kv_group)
    for copies in stage.on_every_stage:
        if copies[0].requires_grad and mesh.layout.pp > 1:
            _sum_copies(copies, mesh.pp_group)
    first, last = stage.chunks[0], stage.chunks[-1]
    if mesh.layout.pp > 1 and first.has_embedding_copy:
        if first.stage.is_first and first.embedding.weight.requires_grad:
            _sum([first.embedding.weight], parallel_state.get_embedding_group())
        if last.embedding_copy is not None and last.embedding_copy.requires_grad:
            _sum([last.embedding_copy], parallel_state.get_embedding_group())


def _sum_copies(copies: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums the gradients of this rank's copies of a weight, and of all stages' copies; each copy gets the sum."""
    total = torch.stack([gradient(parameter).flatten() for parameter in copies]).sum(0)
    dist.all_reduce(total, group=group)
    for parameter in copies:
        set_gradient(parameter, total)


def _sum(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums the gradients of `parameters`, if there are any, over `group` in one all-reduce."""
    if not parameters:
        return
    gradients = [gradient(parameter) for parameter in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=group)
    for parameter, total in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        set_gradient(parameter, total)
