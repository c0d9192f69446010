"""Facts about a step that hold exactly in any precision: the gradient norm, and weights that several ranks hold."""

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pretrain.model.slices import is_expert, tp_split
from pretrain.parallel import zero
from pretrain.parallel.engine import Engine


def gathered_norm(engine: Engine) -> float:
    """Computes the norm of the gradients, gathered over data parallel, each counted once; collective."""
    mesh = engine.mesh
    total = torch.zeros((), dtype=torch.float64)
    for chunk in engine.module.chunks:
        for parameter in chunk.parameters():
            if not parameter.requires_grad:
                continue
            gradient = zero.full_gradient(parameter)
            # Marks that DeepSpeed reads are not trusted: a bug may lie in them.
            split = tp_split(zero.outline(parameter))
            is_copy = mesh.tp_rank > 0 if split is None else mesh.tp_rank % split.copies > 0
            is_copy = is_copy or parameter is chunk.embedding_copy
            if mesh.is_first_holder(parameter) and not is_copy:
                total += gradient.double().square().sum().cpu()
    return float(mesh.sum_over_world(total).sqrt())


def moment(engine: Engine, parameter: nn.Parameter, kind: str) -> torch.Tensor:
    """Gathers Adam's moment `kind` (exp_avg or exp_avg_sq) of a parameter over data parallel; collective."""
    outline = zero.outline(parameter)
    own = zero.fragment(engine.zero, parameter)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    flat = torch.zeros(outline.numel(), dtype=dtype, device=engine.mesh.device)
    if own is not None:
        partition = zero.master_partitions(engine.zero)[own.partition]
        state = zero.adam(engine.zero).state[partition][kind]
        flat.narrow(0, own.start, own.numel).copy_(state.narrow(0, own.offset, own.numel))
    dist.all_reduce(flat, group=engine.mesh.expert_dp_group if is_expert(parameter) else engine.mesh.zero_group)
    return flat.view(outline.shape)


def differing_copies(engine: Engine) -> list[str]:
    """Returns the names of weights of which two ranks hold the same slice with different bits; collective.

    Both the model's weights and the optimizer's master weights are looked at.
    """
    mesh = engine.mesh
    digests = {}
    for name, parameter in engine.module.named_global_parameters():
        offset = list(mesh.slices.offset(zero.outline(parameter)))
        for kind, weight in ("weight", zero.current_weight(parameter)), ("master weight", zero.full_weight(parameter)):
            digests[f"{kind} {name} at {offset}"] = _digest(weight)
    known: dict[str, str] = {}
    differing: dict[str, Any] = {}
    for own in mesh.gather_json(digests):
        for key, digest in own.items():
            if known.setdefault(key, digest) != digest:
                differing[key] = None
    return list(differing)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
