"""Builder of the training configs that tests write: what all of them share, and what one adds or sets otherwise."""

from pathlib import Path
from typing import Any

from configs.loader import toml

_MODEL = {"vocab_size": 64, "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32, "num_heads": 4}
_TRAIN: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "train": {"steps": 20, "global_batch_size": 4, "micro_batch_size": 2, "seq_length": 16},
    "optimizer": {"lr": 0.1},
}
_TUNE = _TRAIN | {"init": {"run": "runs/y"}}
# The least that a config of each kind has to say.
BASES: dict[str, dict[str, Any]] = {
    "pretrain": _TRAIN | {"model": _MODEL | {"num_kv_heads": 2}, "data": {"plan": "plan"}},
    "sft": _TUNE | {"data": {"dialogues": ["a"]}},
    "dpo": _TUNE | {"data": {"pairs": ["a"]}},
    "distill": _TUNE | {"teacher": {"run": "runs/z"}, "data": {"dialogues": ["a"]}},
    "rm": _TUNE | {"data": {"files": ["a"]}},
    "ppo": _TUNE | {"task": {}},
    "grpo": _TUNE | {"task": {}},
    "sample": {"run": {"dir": "runs/x"}, "init": {"run": "runs/y"}, "task": {}, "sample": {"completions": 2}},
    "export": {"run": "runs/y", "out": "out"},
    "launch": {},
}


def training_config(
    run_dir: Path | str, steps: int, batch: tuple[int, int], seq_length: int, **sections: dict[str, Any]
) -> dict[str, Any]:
    """Returns a config in fp32, with a constant learning rate and without TensorBoard, and with the given sections.

    `batch` is the sizes of the global batch and the micro-batch. A key that `sections` has stands in place of the one
    that all tests share.
    """
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir)},
        "train": {
            "steps": steps,
            "global_batch_size": batch[0],
            "micro_batch_size": batch[1],
            "seq_length": seq_length,
            "precision": "fp32",
        },
        "schedule": {"kind": "constant"},
        "log": {"tensorboard": False},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return tree


def write_training_config(
    path: Path, run_dir: Path, steps: int, batch: tuple[int, int], seq_length: int, **sections: dict[str, Any]
) -> Path:
    """Writes `training_config` of the arguments after `path` to that file, and returns its path."""
    path.write_bytes(toml(training_config(run_dir, steps, batch, seq_length, **sections)))
    return path
