"""Gradients of which several ranks hold a part and that ZeRO knows nothing of: summed after backward, before its step.

- The tied embedding has a copy on the first and on the last pipeline stage. Each copy gets the sum, so both stay
  equal; the last stage's is marked as a copy, so that the grad norm counts it once.
- Under sequence parallel, norm weights are whole on every tensor-parallel rank but see only its share of the
  sequence (Korthikanti et al. 2022). So are QK-norm weights, with or without it: a rank sees only its heads. The grad
  norm counts whole weights on the first such rank alone, so it needs no more than the sum.
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


def mark_copies(stage: PipelineStage) -> None:
    """Marks the last stage's copy of a tied embedding for DeepSpeed's grad norm."""
    last = stage.chunks[-1]
    if last.model_config.tie_embeddings and last.stage.is_last and not last.stage.is_first:
        last.lm_head.weight.ds_pipe_replicated = True


def sum_partial(stage: PipelineStage, mesh: Mesh) -> None:
    """Makes every rank's gradients those of the whole batch of its data-parallel replica."""
    partial = _partial_norms(stage, mesh)
    if partial:
        _sum([norm.weight for norm in partial], mesh.tp_group)
    first, last = stage.chunks[0], stage.chunks[-1]
    if first.model_config.tie_embeddings and not last.tied_here:
        if first.stage.is_first:
            _sum([first.embedding.weight], parallel_state.get_embedding_group())
        if last.stage.is_last:
            _sum([last.lm_head.weight], parallel_state.get_embedding_group())


def _partial_norms(stage: PipelineStage, mesh: Mesh) -> list[RMSNorm]:
    """Norms of which each tensor-parallel rank has a part of the gradient."""
    if mesh.layout.sp:
        return [module for module in stage.modules() if isinstance(module, RMSNorm)]
    attentions = [block.attention for block in stage.blocks.values()] if mesh.layout.tp > 1 else []
    return [norm for attention in attentions if attention.has_qk_norm for norm in (attention.q_norm, attention.k_norm)]


def _sum(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """One all-reduce for all of them."""
    gradients = [gradient(parameter) for parameter in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, group=group)
    for parameter, total in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        set_gradient(parameter, total)
