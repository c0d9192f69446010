"""A formula for the peak memory of a step on one rank of ZeRO stage 1, which the check holds against the card's.

State is 2 bytes a parameter for bf16 weights, and 4 each for gradients, master weights and both moments. Activations
are what autograd saves of a micro-batch, counted by running the forward pass on meta tensors, which take no memory. The
head adds a chunk of logits and its gradients. Left out are the temporary tensors of a layer's backward pass and what
the allocator cannot use.
"""

from typing import Any
from unittest import mock

import torch

from configs.model import ModelConfig
from configs.train import TrainSection
from pretrain.model import Decoder, LayerContext
from pretrain.model.batch import Batch
from pretrain.model.context import ForwardContext
from pretrain.model.head_loss import CHUNK_GPU, HeadLoss
from pretrain.model.losses import NextToken

META = torch.device("meta")


class _Flash(torch.autograd.Function):
    """Saves what flash attention saves; on meta tensors torch would take the kernel that keeps all scores."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, logsumexp = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: Any) -> torch.Tensor:
    return _Flash.apply(q, k, v)


def expected(model: ModelConfig, train: TrainSection, batch: Batch, dtype: torch.dtype) -> dict[str, int]:
    """Returns the terms of the formula in bytes: state, activations, head, and their sum `all`."""
    weight, parameters = dtype.itemsize, model.num_parameters()
    master = 0 if dtype == torch.float32 else 4
    vocabulary = model.vocab_size * model.hidden_size * weight
    chunk = min(CHUNK_GPU, len(batch.trained) * model.vocab_size) * (2 * weight + 4)
    terms = {
        "state": parameters * (weight + 4 + master + 8),
        "activations": _saved(model, train, batch, dtype),
        "head": chunk + 2 * vocabulary,  # the head's gradient before it is accumulated, and the embedding's
    }
    return terms | {"all": sum(terms.values())}


def _saved(model: ModelConfig, train: TrainSection, batch: Batch, dtype: torch.dtype) -> int:
    """Counts the bytes of the tensors that autograd saves in the forward pass of a micro-batch, without weights."""
    # megatron-core's layers put their weights there; its `torch` may be what `redirect_to_cpu` put in its place.
    with mock.patch("megatron.core.tensor_parallel.layers.torch.cuda.current_device", lambda: META):
        decoder = Decoder(model, context=LayerContext(dtype=dtype, device=META))
    assert all(parameter.device == META for parameter in decoder.parameters())
    decoder.set_recompute(train.recompute)
    weights = {_storage(parameter) for parameter in decoder.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Any] = []  # so that no storage is freed and its number given to another

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == META and _storage(tensor) not in weights:
            sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    moved = batch.to(META)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, mock.patch("pretrain.model.attention_scores.attend_documents", _attend):
        context = ForwardContext.of_batch(model, moved)
        loss = HeadLoss(moved, NextToken(), 1.0, 1)
        decoder(moved.tokens, moved.positions, moved.segments, wanted=moved.trained, context=context, loss=loss)
    return sum(sizes.values())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
