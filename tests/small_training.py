"""Pretraining config of a tiny model on a plan of a few tokens, for tests that start the command itself."""

import json
from pathlib import Path

from configs.loader import validate
from configs.mixture import MixtureConfig
from data_pipeline.mixture.plan_files import build_stages
from tests.parallel.matrix import MODELS
from tests.small_data import VOCAB, make_tokens
from tests.training_configs import write_training_config


def write_config(folder: Path, steps: int, run_dir: Path, rows: int, every: int = 100_000) -> Path:
    """Writes the config of a dense model of a few thousand weights; a step takes some hundredths of a second."""
    mixture = {"seq_length": 32, "weights": {"code": 0.5, "prose": 0.5}, "max_epochs": 100_000, "samples": rows}
    build_stages(*make_tokens(folder), folder / "plan", validate(MixtureConfig, mixture).plans())
    return write_training_config(
        folder / "train.toml",
        run_dir,
        steps,
        (4, 2),
        32,
        run={"seed": 3},
        model={**MODELS["dense"], "vocab_size": VOCAB},
        data={"plan": str(folder / "plan")},
        optimizer={"lr": 0.001, "eps": 1e-6},
        checkpoint={"every": every},
        eval={"rows": 4, "every": 1000},
    )


def last_step(run_dir: Path) -> int:
    """Returns the newest step in the run's log."""
    log = run_dir / "metrics.jsonl"
    lines = [line for line in log.read_text().splitlines() if '"loss"' in line] if log.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines and lines[-1].endswith("}") else 0
