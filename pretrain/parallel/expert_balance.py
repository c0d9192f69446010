"""The balance of all MoE layers over the layout: what `model.balance` counts in each, started, summed and reported.

Leaves out the losses and the bias themselves: they are each layer's own, in `model.balance`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from configs.train import ModelConfig
from pretrain.model.balance import LossDenominators
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage


def begin_step(stage: PipelineStage, denominators: LossDenominators) -> None:
    """Makes every MoE layer forget the last step's counts and divide this step's losses by `denominators`."""
    for moe in stage.moe_layers.values():
        moe.balance.start()
        moe.balance.denominators = denominators


def finish_step(stage: PipelineStage, mesh: Mesh) -> None:
    """Tells every MoE layer how the global batch's tokens chose; all ranks that hold a layer are told the same."""
    layers = stage.moe_layers
    if not layers:
        return
    tokens = torch.stack([moe.balance.tokens for moe in layers.values()])
    dist.all_reduce(tokens, group=mesh.zero_group)
    for moe, tokens_E in zip(layers.values(), tokens, strict=True):
        moe.balance.finish(tokens_E)


def state(stage: PipelineStage, mesh: Mesh) -> dict[str, list[float]]:
    """The MoE layers' state of balance by global name, the same on all ranks; collective."""
    own = {name: tensor.tolist() for name, tensor in stage.named_balance().items()}
    return {name: values for part in mesh.gather_json(own) for name, values in part.items()}


def restore(stage: PipelineStage, saved: Mapping[str, Sequence[float]]) -> None:
    """Copies what `state` gave back into this rank's layers."""
    for name, tensor in stage.named_balance().items():
        tensor.copy_(torch.tensor(saved[name]))


def stats(stage: PipelineStage, mesh: Mesh, config: ModelConfig) -> dict[str, Any]:
    """What the last step's metrics say of the experts, over all layers and by layer; collective, {} for a dense model.

    The auxiliary loss (mean over layers), the busiest expert's tokens over a fair share (worst layer), and with a
    capacity limit the share of choices that it dropped (mean).
    """
    moe = config.moe
    if moe is None:
        return {}
    values = torch.zeros(config.num_layers, 2 + moe.num_experts, dtype=torch.float64)
    if mesh.tp_rank == 0:
        for layer, block in stage.moe_layers.items():
            balance = block.balance
            values[layer, 0], values[layer, 1] = balance.aux_loss, balance.dropped
            values[layer, 2:] = balance.tokens
    values = mesh.sum_over_world(values).cpu()
    aux_loss, dropped, tokens = values[:, 0], values[:, 1], values[:, 2:]
    load, chosen = tokens.max(1).values / tokens.mean(1), tokens.sum(1)
    stats = {"moe_aux_loss": (aux_loss, aux_loss.mean()), "moe_max_load": (load, load.max())}
    if moe.capacity_factor is not None:
        stats["moe_dropped"] = dropped / chosen, dropped.sum() / chosen.sum()
    by_layer = {
        f"{name}_by_layer": {f"layer {i}": float(value) for i, value in enumerate(layers)}
        for name, (layers, _) in stats.items()
    }
    return {name: float(whole) for name, (_, whole) in stats.items()} | by_layer
