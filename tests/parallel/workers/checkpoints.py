"""Functions run in the ranks: other trainers' libraries write checkpoints of small models in their own formats."""

import contextlib
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def save_sharded(weights: str, folder: str) -> None:
    """Writes the tensors of a safetensors file, each split over the ranks, as torchtitan does with FSDP."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in load_file(weights).items()}
    moments = {name: {"exp_avg": torch.ones_like(tensor), "step": torch.tensor(3.0)} for name, tensor in model.items()}
    state = {"model": model, "optimizer": {"state": moments}, "train_state": {"step": 3, "losses": [1.0]}}
    dcp.save(state, checkpoint_id=folder)


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """Context in which megatron-core's model and its writer run on a CPU, which they do not know how to."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random

    with contextlib.ExitStack() as stack:
        for owner, name, function in (
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.cuda, "current_device", lambda: torch.device("cpu")),
            (random.get_cuda_rng_tracker(), "fork", lambda *_: contextlib.nullcontext()),
            (filesystem_async, "_get_write_results_queue", queue.Queue),  # a rank has no main module for a manager
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield


def save_megatron(folder: str, sizes: dict[str, Any], vocabulary: int, metadata: dict[str, Any]) -> list[Any]:
    """Makes megatron-core's GPTModel with tp over all ranks, writes it as torch_dist, and returns this rank's logits.

    The logits are of this rank's part of the vocabulary, for 2 rows of 10 tokens from 0 on.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    with _on_cpu():
        tp = dist.get_world_size()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        config = TransformerConfig(
            **sizes,
            normalization="RMSNorm",
            add_bias_linear=False,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            use_cpu_initialization=True,
            tensor_model_parallel_size=tp,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            params_dtype=torch.float32,
            init_method_std=0.3,
        )
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        model = GPTModel(
            config,
            spec,
            vocab_size=vocabulary,
            max_sequence_length=64,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layernorm" in name:  # all ones otherwise, which a misplaced norm would not change
                    parameter.copy_(1 + torch.arange(len(parameter)) / len(parameter) * (1 + len(name) % 5))
        tokens = torch.arange(20).view(2, 10)
        mask = torch.triu(torch.ones(10, 10, dtype=torch.bool), 1)[None, None]
        logits = model(tokens, torch.arange(10)[None].expand(2, -1), mask).detach()
        if dist.get_rank() == 0:
            Path(folder).mkdir()
        dist.barrier()
        dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), folder, ("torch_dist", 1))
    return list(logits.tolist())
