"""Floating-point operations: how many a token of training takes, and how many a GPU can do."""

import torch

from configs.train import ModelConfig


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward: 6 per active weight in a product, and 12 * layers * heads * dim * S/2 for attention."""
    lookups = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    attention = 6 * model.num_layers * model.num_heads * model.dim_per_head * seq_length
    return 6 * (model.num_parameters(active=True) - lookups) + attention


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of a known GPU in flop/s (vendors' data sheets); None where no peak is known, CPUs included."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    known = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
    return next((flops for key, flops in known.items() if key in name), None)
