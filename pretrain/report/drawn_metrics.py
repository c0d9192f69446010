"""Metrics of a run as its report and comparisons of runs draw them: which have charts, and one record for each step."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Order, titles and units of charts; charts of other numbers follow, titled by their keys.
CHARTS = {
    "reward": ("Mean reward", "reward"),
    "loss": ("Training loss", "nats per token"),
    "loss_by_source": ("Training loss by source", "nats per token"),
    "grad_norm": ("Gradient norm, before clipping", "norm"),
    "lr": ("Learning rate", "rate"),
    "tokens_per_s": ("Speed", "tokens per second"),
    "mfu": ("Model FLOPs utilisation", "share of the peak"),
    "memory_bytes": ("Memory of one rank", "bytes"),
    "save_copy_s": ("Wait for a checkpoint's copy", "seconds"),
    "update_ratio": ("Update to weight norm", "ratio"),
    "activation_rms_by_layer": ("Outputs of layers, root mean square", "size"),
    "attention_logit": ("Largest attention logit", "logit"),
    "attention_logit_by_layer": ("Largest attention logit by layer", "logit"),
    "kl_rollout": ("KL divergence from the sampler", "nats per token"),
    "kl_reference": ("KL divergence from the reference, charged", "nats per token"),
    "kl_to_reference": ("KL divergence from the reference", "nats per token"),
}
NOT_DRAWN = {"step", "tokens", "eval", "loss_spike", "grad_norm_spike", "skipped"}
WITHOUT_NOISE = {"lr", "memory_bytes"}  # drawn without a running mean


def last_of_each_step(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one record per step in the order of steps; where a step has several, later values replace earlier ones.

    A resumed run repeats the steps after its checkpoint, and evaluations have records of their own.
    """
    merged: dict[int, dict[str, Any]] = {}
    for record in records:
        if "step" in record:
            merged[record["step"]] = {**merged.get(record["step"], {}), **record}
    return [merged[step] for step in sorted(merged)]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one if the file is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
