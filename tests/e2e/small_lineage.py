"""Configs of a small model's pretraining, SFT and GRPO, each with another sequence length."""

from pathlib import Path
from typing import Any

from tests.small_data import VOCAB

SEQ_LENGTH, LONGER, SHORTER = 48, 56, 24  # of pretraining, SFT and GRPO
MODEL = {"vocab_size": VOCAB, "num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_heads": 2,
         "num_kv_heads": 1}  # fmt: skip
SORT = {"digits": 3, "max_new_tokens": 4, "eval_prompts": 2}


def settings(run_dir: Path, seq_length: int, steps: int) -> dict[str, Any]:
    """The sections that all three have."""
    batch = {"global_batch_size": 4, "micro_batch_size": 4, "seq_length": seq_length, "steps": steps}
    return {
        "run": {"dir": str(run_dir), "seed": 1},
        "train": batch | {"precision": "fp32"},
        "optimizer": {"lr": 0.01},
        "schedule": {"kind": "constant"},
        "checkpoint": {"every": 2},
        "eval": {"rows": 0, "every": 1000},
        "log": {"tensorboard": False},
    }


def pretraining(base: Path) -> dict[str, Any]:
    """Four steps on the plan of `base`, into its folder pretrain."""
    return settings(base / "pretrain", SEQ_LENGTH, 4) | {"model": MODEL, "data": {"plan": str(base / "data/plan")}}


def tuning(base: Path, run_dir: Path, **init: str) -> dict[str, Any]:
    """Two steps of SFT from the pretraining of `base`, or from what `init` names."""
    own = {"init": init or {"run": str(base / "pretrain")}, "data": {}, "task": SORT | {"demonstrations": 30}}
    return settings(run_dir, LONGER, 2) | own


def rewarding(init: Path, run_dir: Path, **more: str) -> dict[str, Any]:
    """Two steps of GRPO from the run `init`; `more` are further keys of its section."""
    own = {"init": {"run": str(init)} | more, "task": SORT, "grpo": {"group_size": 2}}
    return settings(run_dir, SHORTER, 2) | own
