"""Gradients that other ranks need and ZeRO knows nothing of, summed after backward and before its step.

Here: the tied embedding, whose copies live on the first and the last pipeline stage. Each copy gets the sum, so both
stay equal; the last stage's is marked as a copy, so that the grad norm counts it once.
"""

import torch.distributed as dist
from torch import nn

from pretrain.model import Decoder
from pretrain.parallel.backends import parallel_state
from pretrain.parallel.zero import gradient


def mark_copies(model: Decoder) -> None:
    """Marks the last stage's copy of a tied embedding for DeepSpeed's grad norm."""
    if model.model_config.tie_embeddings and model.stage.is_last and not model.stage.is_first:
        model.lm_head.weight.ds_pipe_replicated = True


def sum_replicated(model: Decoder) -> None:
    """Sums the gradients of parameters that several stages hold."""
    if not model.model_config.tie_embeddings or model.tied_here:
        return
    if model.stage.is_first:
        _sum_gradient(model.embedding.weight)
    elif model.stage.is_last:
        _sum_gradient(model.lm_head.weight)


def _sum_gradient(parameter: nn.Parameter) -> None:
    dist.all_reduce(gradient(parameter), group=parallel_state.get_embedding_group())
