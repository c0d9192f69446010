"""Losses as functions of each label's log-probability.

A loss function gives a value per token. The engine weighs it by `batch.loss_mask`, sums over the whole global batch and
divides by the sum of that mask: never a mean of means.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from pretrain.megatron import gather_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from pretrain.model.batch import Batch


class LossFunction(Protocol):
    """A loss per token [B, S], and tensors [B, S] by the names in `metrics`, whose masked means are logged.

    Log-probabilities are 0 where the loss mask is: nothing is computed there.
    """

    metrics: tuple[str, ...]
    temperature: float  # logits are divided by it before the softmax

    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]: ...


class NextToken:
    """Cross entropy of the next token, for pretraining, and for SFT with a mask that selects the answers."""

    metrics: tuple[str, ...] = ()
    temperature = 1.0

    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -logprobs_BS, {}


def label_logprobs(logits_NV: torch.Tensor, labels_N: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Computes log softmax(logits)[label], [N], in fp32 or fp64.

    Logits split over tp go through megatron-core's vocab-parallel loss. It rounds to fp32, so logits in fp64, which
    only a proof has, are gathered instead.
    """
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    is_split = logits_NV.shape[1] != vocab_size
    if is_split and logits_NV.dtype == torch.float32:
        return -vocab_parallel_cross_entropy(logits_NV, labels_N)
    if is_split:
        logits_NV = gather_from_tensor_model_parallel_region(logits_NV)
    return -F.cross_entropy(logits_NV, labels_N, reduction="none")
