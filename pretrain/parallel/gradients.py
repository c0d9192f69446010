"""Sums gradients of which several ranks hold a part and which ZeRO does not sum: after backward, before ZeRO's step.

- Tied embeddings: the first and the last pipeline stage each hold a copy. Both copies get the sum and so stay equal;
  the last stage's is marked, so that the grad norm counts it once.
- Norm weights under sequence parallel: every tensor-parallel rank holds the whole weight but sees only its part of the
  sequence (Korthikanti et al. 2022). QK-norm weights at tp>1: every rank sees only its own heads. The grad norm counts
  such weights on the first tensor-parallel rank alone, so the sum is all that is needed.
- Keys' and values' weights where there are fewer key-value heads than tensor-parallel ranks: each head is on several of
  them, and each sees only its own query heads. All get the sum, and the grad norm counts the first one's alone.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from pretrain.megatron import parallel_state
from pretrain.model.norm import RMSNorm
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage
from pretrain.parallel.zero import gradient, set_gradient


def mark_copies(stage: PipelineStage, mesh: Mesh) -> None:
    """Marks copies, of a tied embedding or a key-value head, so that DeepSpeed leaves them out of the grad norm."""
    for parameter in stage.parameters():
        if not mesh.is_first_copy(parameter):
            vars(parameter)["tensor_model_parallel"] = False  # counted then on the first tensor-parallel rank alone
    last = stage.chunks[-1]
    if last.model_config.tie_embeddings and last.stage.is_last and not last.stage.is_first:
        last.lm_head.weight.ds_pipe_replicated = True


def sum_partial(stage: PipelineStage, mesh: Mesh) -> None:
    """Sums partial gradients over tensor-parallel ranks, and those of tied embeddings over the first and last stage."""
    partial = _partial_norms(stage, mesh)
    if partial:
        _sum([norm.weight for norm in partial], mesh.tp_group)
    if mesh.kv_group is not None:
        attentions = [block.attention for block in stage.blocks.values()]
        _sum([part.weight for own in attentions for part in (own.k_proj, own.v_proj)], mesh.kv_group)
    first, last = stage.chunks[0], stage.chunks[-1]
    if first.model_config.tie_embeddings and not last.tied_here:
        if first.stage.is_first:
            _sum([first.embedding.weight], parallel_state.get_embedding_group())
        if last.stage.is_last:
            _sum([last.lm_head.weight], parallel_state.get_embedding_group())


def _partial_norms(stage: PipelineStage, mesh: Mesh) -> list[RMSNorm]:
    """Lists the norms whose gradient is partial on each tensor-parallel rank."""
    if mesh.layout.sp:
        return [module for module in stage.modules() if isinstance(module, RMSNorm)]
    attentions = [block.attention for block in stage.blocks.values()] if mesh.layout.tp > 1 else []
    return [norm for attention in attentions if attention.has_qk_norm for norm in (attention.q_norm, attention.k_norm)]


def _sum(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums the gradients of `parameters` over `group` in one all-reduce."""
    gradients = [gradient(parameter) for parameter in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=group)
    for parameter, total in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        set_gradient(parameter, total)
