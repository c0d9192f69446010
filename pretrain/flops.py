"""Floating-point operations that one token of training takes, and that a device can do in a second."""

import time

import torch

from configs.model import LayerConfig, ModelConfig
from configs.model_size import mtp_parameters
from pretrain.parallel.groups import Mesh


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Returns the operations of forward and backward pass per token, for rows of `seq_length` tokens (S).

    They are 6 per active weight that is multiplied, and what layers mix tokens by (`_mixing`). Modules of multi-token
    prediction are layers, and each multiplies the head again. Embedding lookups multiply nothing, and recomputation is
    not counted.
    """
    lookups = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    depth = model.head.mtp_depth
    mixing = sum(_mixing(layer, seq_length) for layer in (*model.layers, *model.mtp_layers))
    further = mtp_parameters(model, active=True) + depth * model.head_size * model.hidden_size
    return 6 * (model.num_parameters(active=True) - lookups + further) + mixing


def _mixing(layer: LayerConfig, seq_length: int) -> int:
    """Returns the operations on keys and values: 12 * heads * dim * S/2 of causal attention.

    Gated delta nets read each value head's state of key * value elements twice and write it once, whatever S is.
    """
    if delta := layer.attention.delta:
        return 6 * 3 * delta.num_value_heads * delta.key_head_dim * delta.value_head_dim
    return 6 * layer.num_heads * layer.head_dim * seq_length


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns a GPU's dense peak in flop/s from its vendor's data sheet; None for other devices and dtypes."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    known = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}
    return next((flops for key, flops in known.items() if key in name), None)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the flop/s that large matrix products reach on this device, the best of several, in under a second."""
    size, deadline, best = 8192 if device.type == "cuda" else 1024, time.perf_counter() + 0.5, 0.0
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    for attempt in range(100):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        ended = time.perf_counter()
        if attempt:  # the first one starts threads and libraries
            best = max(best, 2 * size**3 / (ended - started))
        if attempt > 2 and ended > deadline:
            break
    return best


def mfu_per_rate(
    model: ModelConfig, seq_length: int, mesh: Mesh, dtype: torch.dtype, measures_peak: bool
) -> float | None:
    """Returns MFU / (tokens/s) of a run; None where no peak is known. Collective if the peak is measured."""
    if measures_peak:
        mesh.gather_json(None)  # so that all ranks measure at once, as they compute at once
        peak = float(mesh.sum_on_host(torch.tensor([measured_flops(mesh.device, dtype)]))[0])
    else:
        peak = (peak_flops(mesh.device, dtype) or 0) * mesh.layout.world_size
    return flops_per_token(model, seq_length) / peak if peak else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
