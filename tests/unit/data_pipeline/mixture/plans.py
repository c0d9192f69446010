"""Helpers: small mixture plans over the session's token stores, and comparison of rows."""

from pathlib import Path
from typing import Any

import numpy as np

from configs.loader import validate
from configs.mixture import MixtureConfig, PlanConfig
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.mixture.rows import Row

GENERAL = {"seq_length": 64, "samples": 900, "seed": 3, "weights": {"english": 0.5, "chinese": 0.3, "code": 0.2}}


STAGES = {
    "general": {},
    # English is not used here, and code is used more often.
    "annealing": {"samples": 1400, "packing": "concat", "weights": {"code": 0.8, "chinese": 0.2}},
    "long_context": {"samples": 450, "seq_length": 256, "weights": {"english": 0.3, "code": 0.7}},
}


def mixture(**changes: Any) -> MixtureConfig:
    return validate(MixtureConfig, {**GENERAL, "max_epochs": 9, "stages": STAGES, **changes})


WEIGHTS = {"english": 0.5, "chinese": 0.2, "code": 0.3}


def make(tokens: Path, tokenizer: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"seq_length": 64, "samples": 1000, "seed": 3, "weights": WEIGHTS}
    return build_plan(tokens, tokenizer, out, PlanConfig(**settings | changes))


def same(a: Row, b: Row) -> bool:
    arrays = ("tokens", "labels", "loss_mask", "positions", "segments")
    return a.source == b.source and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
