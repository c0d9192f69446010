"""Measures of a training step that cost more than a sum, taken in the steps that ask for them.

They are the root mean square of each layer's outputs, each layer's largest attention logit (the scaled product of a
query and a key that it sees, before any soft cap), and the norms of the weights and of their update. They stay on the
device until the step's results are read. Compiled blocks show no logits, and DeepSpeed's optimizers no update.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from configs.model import ModelConfig
from pretrain.model.layers import is_recomputing
from pretrain.parallel.distributed_optimizer import DistributedOptimizer
from pretrain.parallel.groups import Mesh
from pretrain.parallel.pipeline_stage import PipelineStage

PENALTY = "orthogonality_penalty"  # of AdaLoRA, minimized beside the loss


class StepDetails:
    """Measures of one step: `begin` before its forward passes, `finish` after its update."""

    def __init__(self, stage: PipelineStage, mesh: Mesh, optimizer: Any, compiled: bool) -> None:
        self._blocks, self._mesh = stage.blocks, mesh
        self._optimizer = optimizer if isinstance(optimizer, DistributedOptimizer) else None
        self._compiled = compiled
        self._squares: dict[int, torch.Tensor] = {}  # [sum of squares, number of elements] of each layer's outputs
        self._handles: list[RemovableHandle] = []

    def begin(self) -> None:
        """Begins to measure what the blocks compute."""
        device = self._mesh.device
        for layer, block in self._blocks.items():
            self._squares[layer] = torch.zeros(2, dtype=torch.float64, device=device)
            self._handles.append(block.register_forward_hook(self._noting(layer)))
            if not self._compiled:
                block.attention.largest_logit = torch.full((), -torch.inf, device=device)
        if self._optimizer is not None:
            self._optimizer.squares_of_update = torch.zeros(2, dtype=torch.float64, device=device)

    def finish(self, config: ModelConfig) -> dict[str, torch.Tensor]:
        """Ends the measurement; returns what all ranks found, on the device, for `described`; collective."""
        mesh, layers = self._mesh, config.num_layers + config.head.mtp_depth
        for handle in self._handles:
            handle.remove()
        self._handles = []
        squares = torch.zeros(layers, 2, dtype=torch.float64, device=mesh.device)
        logits = torch.full((layers,), -torch.inf, device=mesh.device)
        for layer, block in self._blocks.items():
            squares[layer] = self._squares[layer]  # ranks that hold the same outputs change no mean
            if block.attention.largest_logit is not None:
                logits[layer] = block.attention.largest_logit
                block.attention.largest_logit = None
        dist.all_reduce(logits, op=dist.ReduceOp.MAX)
        found = {"activations": mesh.sum_over_world(squares), "logits": logits}
        if self._optimizer is not None and self._optimizer.squares_of_update is not None:
            found["norms"] = mesh.sum_over_world(self._optimizer.squares_of_update)
            self._optimizer.squares_of_update = None
        return found

    def _noting(self, layer: int) -> Any:
        squares = self._squares[layer]

        def note(_block: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            if not is_recomputing():
                squares[0] += torch.linalg.vector_norm(output.detach(), dtype=torch.float32).double().square()
                squares[1] += output.numel()

        return note


def described(found: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Computes the metrics from the results of `finish` in host memory.

    `activation_rms_by_layer` and `attention_logit_by_layer` have a value for each layer, `attention_logit` is the
    largest of all, and `update_ratio` is `update_norm` divided by `weight_norm`, both over all trained weights.
    `PENALTY` is in every step of AdaLoRA, also in those that are not detailed.
    """
    penalty = {PENALTY: float(found[PENALTY])} if PENALTY in found else {}
    if "activations" not in found:
        return penalty
    sums, counts = found["activations"].T
    rms = (sums / counts.clamp(min=1)).sqrt().tolist()
    record: dict[str, Any] = penalty | {"activation_rms_by_layer": {f"layer {i}": value for i, value in enumerate(rms)}}
    logits = {f"layer {i}": x for i, x in enumerate(found["logits"].tolist()) if x != -torch.inf}
    if logits:
        record |= {"attention_logit": max(logits.values()), "attention_logit_by_layer": logits}
    if "norms" in found:
        update, weight = found["norms"].sqrt().tolist()
        record |= {"update_norm": update, "weight_norm": weight, "update_ratio": update / max(weight, 1e-30)}
    return record
