"""Load balancing of all MoE layers over all ranks: resets, sums, saves and reports each layer's expert counts.

The balancing losses and the router bias of a single layer are in `pretrain.model.moe.balance`.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from configs.model import ModelConfig
from pretrain.model.moe.balance import LossDenominators
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage


def begin_step(stage: PipelineStage, denominators: LossDenominators) -> None:
    """Resets the counts of every MoE layer and sets the numbers that this step's losses are divided by."""
    for moe in stage.moe_layers.values():
        moe.balance.start()
        moe.balance.denominators = denominators


def finish_step(stage: PipelineStage, mesh: Mesh, changes: torch.Tensor) -> None:
    """Sums the experts' token counts over the global batch and updates load and router bias of every MoE layer.

    These stay as they are where `changes`, a boolean on the device, is false, and where the router is frozen.
    """
    layers = stage.moe_layers
    if not layers:
        return
    tokens = torch.stack([moe.balance.tokens for moe in layers.values()])
    dist.all_reduce(tokens, group=mesh.zero_group)
    for moe, tokens_E in zip(layers.values(), tokens, strict=True):
        if moe.router.weight.requires_grad:  # what chooses experts of a frozen router is frozen too
            moe.balance.finish(tokens_E, changes)


def state(stage: PipelineStage, mesh: Mesh) -> dict[str, list[float]]:
    """Returns load and router bias of all MoE layers by global name, the same on all ranks; collective."""
    own = {name: tensor.tolist() for name, tensor in stage.named_balance().items()}
    return {name: values for part in mesh.gather_json(own) for name, values in part.items()}


def restore(stage: PipelineStage, saved: Mapping[str, torch.Tensor]) -> None:
    """Copies the values of `state` that are saved into this rank's layers; the others stay as they are."""
    for name, tensor in stage.named_balance().items():
        if name in saved:
            tensor.copy_(saved[name])


def counts(stage: PipelineStage, mesh: Mesh, config: ModelConfig) -> torch.Tensor | None:
    """Sums over all ranks what `described` needs of the last step, on the device; collective. None for a dense model.

    Each row of the result [layers, 2 + experts] has a layer's auxiliary loss, the number of choices that its capacity
    limit dropped, and how often each of its experts was chosen.
    """
    moe = config.moe
    if moe is None:
        return None
    layers = config.num_layers + config.head.mtp_depth
    values = torch.zeros(layers, 2 + moe.num_experts, dtype=torch.float64, device=mesh.device)
    if mesh.tp_rank == 0:
        for layer, block in stage.moe_layers.items():
            balance = block.balance
            values[layer, 0], values[layer, 1] = balance.aux_loss, balance.dropped
            values[layer, 2:] = balance.tokens
    return mesh.sum_over_world(values)


def described(counts: torch.Tensor | None, config: ModelConfig) -> dict[str, Any]:
    """Computes expert metrics, over all layers and by layer, from `counts` in host memory; {} for a dense model.

    `moe_aux_loss` is the auxiliary loss (mean over layers), `moe_max_load` the busiest expert's token count divided by
    the mean count (maximum over layers), and `moe_dropped`, with a capacity limit, the share of choices dropped. Layers
    without experts count in none of them.
    """
    if counts is None or config.moe is None:
        return {}
    with_experts = [layer.index for layer in (*config.layers, *config.mtp_layers) if layer.moe]
    counts = counts[with_experts]
    aux_loss, dropped, tokens = counts[:, 0], counts[:, 1], counts[:, 2:]
    load, chosen = tokens.max(1).values / tokens.mean(1), tokens.sum(1)
    stats = {"moe_aux_loss": (aux_loss, aux_loss.mean()), "moe_max_load": (load, load.max())}
    if config.moe.capacity_factor is not None:
        stats["moe_dropped"] = dropped / chosen, dropped.sum() / chosen.sum()
    by_layer = {
        f"{name}_by_layer": {f"layer {i}": float(value) for i, value in zip(with_experts, layers, strict=True)}
        for name, (layers, _) in stats.items()
    }
    return {name: float(whole) for name, (_, whole) in stats.items()} | by_layer


def stats(stage: PipelineStage, mesh: Mesh, config: ModelConfig) -> dict[str, Any]:
    """Returns the last step's expert metrics, see `described`; collective, and it waits for the device."""
    values = counts(stage, mesh, config)
    return described(None if values is None else values.cpu(), config)
