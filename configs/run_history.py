"""Reading of the history of a training run: its data spans, whose keys `pretrain.run.history` explains."""

import json
from pathlib import Path
from typing import Any

from configs.loader import ConfigError
from configs.sealed import CHECKPOINT, SealError

FILE = "history.json"
KEYS = {"first_step", "first_sample", "global_batch_size", "data", "plan"}  # that each data span has


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Reads history.json in a run's folder; without it, the same list in the newest checkpoint that has one.

    Returns an empty list if there is neither. Raises ConfigError for a damaged file.
    """
    path = run_dir / FILE
    if not path.is_file():
        return _in_newest_checkpoint(run_dir)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, list) and all(isinstance(one, dict) and one.keys() >= KEYS for one in found):
            return found
        said = "it is no list of data spans"
    except ValueError as error:
        said = f"it is not JSON: {error}"
    raise ConfigError(
        f"{path} is damaged ({said}); remove it: the newest checkpoint has the history too, and the run's own command "
        "writes the file again when it goes on"
    )


def _in_newest_checkpoint(run_dir: Path) -> list[dict[str, Any]]:
    named = (path.name.removeprefix("step_") for path in run_dir.glob("checkpoints/step_*"))
    for step in sorted((int(name) for name in named if name.isdecimal()), reverse=True):
        manifest = run_dir / "checkpoints" / f"step_{step}" / "manifest.json"
        try:
            return list(CHECKPOINT.read(manifest.read_bytes(), manifest).get("data_spans", []))
        except (OSError, SealError):
            continue
    return []
