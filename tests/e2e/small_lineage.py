"""Configs of pretraining, SFT and GRPO of a small model, which differ in sequence length."""

from pathlib import Path
from typing import Any

from tests.small_data import VOCAB
from tests.training_configs import training_config

SEQ_LENGTH, LONGER, SHORTER = 48, 56, 24  # of pretraining, SFT and GRPO
MODEL = {"vocab_size": VOCAB, "num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_heads": 2,
         "num_kv_heads": 1}  # fmt: skip
SORT = {"digits": 3, "max_new_tokens": 4, "eval_prompts": 2}


def settings(run_dir: Path, seq_length: int, steps: int) -> dict[str, Any]:
    """Returns the sections that all three configs have."""
    shared = {
        "run": {"seed": 1},
        "optimizer": {"lr": 0.01},
        "checkpoint": {"every": 2},
        "eval": {"rows": 0, "every": 1000},
    }
    return training_config(run_dir, steps, (4, 4), seq_length, **shared)


def pretraining(base: Path) -> dict[str, Any]:
    """Returns a config of four steps on the plan in `base`/data; the run is `base`/pretrain."""
    return settings(base / "pretrain", SEQ_LENGTH, 4) | {"model": MODEL, "data": {"plan": str(base / "data/plan")}}


def tuning(base: Path, run_dir: Path, **init: str) -> dict[str, Any]:
    """Returns a config of two SFT steps from the run `base`/pretrain, or from the model that `init` names."""
    own = {"init": init or {"run": str(base / "pretrain")}, "data": {}, "task": SORT | {"demonstrations": 30}}
    return settings(run_dir, LONGER, 2) | own


def rewarding(init: Path, run_dir: Path, **more: str) -> dict[str, Any]:
    """Returns a config of two GRPO steps from the run `init`; `more` are further keys of [grpo]."""
    own = {"init": {"run": str(init)} | more, "task": SORT, "grpo": {"group_size": 2}}
    return settings(run_dir, SHORTER, 2) | own
