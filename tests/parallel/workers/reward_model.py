"""Functions run in the ranks: models with a scalar head that begin from a language model."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from configs.loader import plain, validate
from configs.model import ModelConfig
from pretrain.checkpoint import state, storage
from pretrain.parallel import zero
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
    with storage.Reader(checkpoint) as reader:
        new = state.begin_from(engine, reader)
    return {"new": new, "drawn": drawn, "weights": _digests(engine)}


def _digests(engine: Any) -> dict[str, str]:
    """Returns the SHA-256 of this rank's parameters by their global names."""
    return {
        name: hashlib.sha256(zero.full_weight(parameter).contiguous().numpy().tobytes()).hexdigest()
        for name, parameter in engine.module.named_global_parameters()
    }
