"""Functions run in the ranks: models with a scalar head that begin from a language model."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from configs.loader import plain, validate
from configs.model import ModelConfig
from posttrain.preference.group_packing import Segment, pack
from posttrain.reward_model.reward_losses import MARGIN, PreferenceLoss
from pretrain.checkpoint import state, storage
from pretrain.checkpoint.whole_model import open_model
from pretrain.data.batch_source import micro_batches
from pretrain.parallel import groups, zero
from tests.parallel.matrix import MODELS
from tests.parallel.workers.layouts import make_engine
from tests.parallel.workers.training import save_now


def with_value_head(model: dict[str, Any], parallel: dict[str, Any], folder: str) -> dict[str, Any]:
    """Saves a language model in `folder` if there is none; else restores it into the same model with a scalar head.

    Returns the names of the parameters that are new, the digest of the head as it was drawn, and of all weights.
    """
    checkpoint = storage.directory(folder, 1)
    if not Path(checkpoint).exists():
        engine = make_engine(model, parallel)
        with torch.no_grad():
            for partition in zero.master_partitions(engine.zero):
                partition += 0.5  # other weights than those that are drawn
        zero.update_weights(engine.zero)
        save_now(engine, folder, 1, {"config": {"model": model}})
        return {"weights": _digests(engine)}
    engine = make_engine(plain(validate(ModelConfig, model).with_values()), parallel)
    drawn = _digests(engine).get("value_head.weight")
    with open_model(checkpoint) as tensors:
        new = state.begin_from(engine, tensors)
    return {"new": new, "drawn": drawn, "weights": _digests(engine)}


def _digests(engine: Any) -> dict[str, str]:
    """Returns the SHA-256 of this rank's parameters by their global names."""
    return {
        name: hashlib.sha256(zero.full_weight(parameter).contiguous().numpy().tobytes()).hexdigest()
        for name, parameter in engine.module.named_global_parameters()
    }


def pair_gradients(
    parallel: dict[str, Any], micro_batch_size: int, seq_length: int, out: str, dtype: str = "float32"
) -> dict[str, float]:
    """Computes one step's loss and gradients of eight pairs, packed into rows of `seq_length` tokens, into `out`."""
    model = plain(validate(ModelConfig, MODELS["moe"] | {"moe": None, "num_layers": 4}).with_values())
    engine = make_engine(model, parallel, dtype)
    mesh = engine.mesh
    rows = pack(_pairs(), seq_length, 0)
    share = len(rows) // mesh.layout.dp
    own = rows[mesh.dp_rank * share :][:share]
    engine.accumulate(micro_batches(own, micro_batch_size), PreferenceLoss(centring=0.05))
    tensors = {}
    for chunk in engine.module.chunks:
        for name, parameter in chunk.named_parameters():
            tensors[name] = mesh.gather_whole(zero.full_gradient(parameter), parameter).clone()
    if dist.get_rank(mesh.zero_group) == 0 and mesh.tp_rank == 0:
        save_file(tensors, str(Path(out) / f"stage_{mesh.pp_rank}.safetensors"))
    sums = engine.update(lr=1e-2)
    groups.stop()
    return {"loss": sums.mean_loss, "norm": sums.grad_norm, **sums.metrics}


def _pairs() -> list[list[Segment]]:
    """Makes eight pairs of 24 tokens each, in sides of uneven lengths, with margins."""
    units = []
    for number in range(8):
        draw = np.random.default_rng(number)
        length = int(draw.integers(3, 21))
        unit = []
        for size in (length, 24 - length):
            mask = np.arange(size) == size - 1
            extra = {MARGIN: np.full(size, 0.1 * number)}
            unit.append(Segment(draw.integers(0, 64, size), np.zeros(size, dtype=np.int64), mask, extra))
        units.append(unit)
    return units
