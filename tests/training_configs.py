"""Builder of the training configs that tests write: what all of them share, and what one adds or sets otherwise."""

from pathlib import Path
from typing import Any

from configs.loader import toml


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
