"""Inputs of a recipe's stage: its config, checked before anything runs, the files of data, and folders."""

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.cli import SCHEMAS
from configs.files import file_sha256
from configs.loader import ConfigError, load, read_overridden
from configs.reference import schema_of

MANIFESTS = "checkpoints/step_*/manifest.json"
MARKS = ("plan.json", "trivium_import.json", "config.json", "manifest.json")  # what identifies a folder of other kinds
DATA_KEYS = ("files", "heldout_files", "dialogues", "pairs")  # keys of configs that name files of examples
SCHEMA_NAMES = {"train": "pretrain", "data run": "data", "data baselines": "data"}  # other commands have their own name


def check_config(command: str, config: str, overrides: Sequence[str], key: str) -> None:
    """Raises ConfigError, naming the stage's `key`, if its config with its overrides is not valid.

    A training run that takes its model's sizes from another one is checked when it starts.
    """
    tree = read_overridden(config, overrides)
    if command == "train" and "init" in tree:
        return
    kind = SCHEMA_NAMES.get(command, command)
    assert kind in SCHEMAS
    try:
        load(schema_of(kind), config, overrides)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def data_files(tree: Mapping[str, Any], made: Path) -> list[str]:
    """Returns the files of examples that a config names, sorted, without those below `made`, the recipe's folder."""
    found: set[str] = set()
    for pattern in _patterns(tree):
        found |= {path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()}
    return sorted(path for path in found if made.resolve() not in Path(path).resolve().parents)


def _patterns(tree: Mapping[str, Any]) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _patterns(value)
        elif key in DATA_KEYS and isinstance(value, list):
            yield from (one for one in value if isinstance(one, str))


def result_of(folder: Path, mark: str = "") -> str | None:
    """Hash of what others start from: the newest checkpoint's manifest, else the file `mark`, or one of `MARKS`."""
    steps = {path: path.parent.name.removeprefix("step_") for path in folder.glob(MANIFESTS)}
    newest = max((path for path, step in steps.items() if step.isdecimal()), key=lambda p: int(steps[p]), default=None)
    files = [newest] if newest else [folder / name for name in ([mark] if mark else MARKS)]
    return next((file_sha256(path) for path in files if path.is_file()), None)


def tree_hash(tree: Mapping[str, Any]) -> str:
    """Hash of a config's tree, whatever its comments and layout."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()
