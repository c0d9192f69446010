"""Inputs of a recipe's stage: its config, checked before anything runs, the files of data, and folders."""

import glob
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.checkpoint_folders import model_of, newest_manifest
from configs.config_kind import kind_of_command
from configs.files import file_sha256
from configs.kinds import SCHEMAS, schema_of
from configs.layout import Layout
from configs.loader import ConfigError, load, read_overridden
from configs.method_layout import check_method
from configs.model import ModelConfig
from configs.section import Section

MARKS = ("plan.json", "trivium_import.json", "manifest.json")  # what identifies a folder of other kinds
OF_MODELS = ("*.safetensors", "*.json", "*.jinja", "*.model")  # what identifies a Hugging Face folder
DATA_KEYS = ("files", "heldout_files", "dialogues", "pairs")  # keys of configs that name files of examples


def check_config(command: str, config: str, overrides: Sequence[str], key: str) -> Section | None:
    """Returns a stage's config. Raises ConfigError, naming the stage's `key`, if it is not valid with its overrides.

    It is None for a training run that takes its model's sizes from another one, which is checked when it starts.
    """
    tree = read_overridden(config, overrides)
    if command == "train" and "init" in tree:
        return None
    kind = kind_of_command(command)
    assert kind in SCHEMAS
    try:
        return load(schema_of(kind), config, overrides)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def check_layout(config: Section, ranks: int, made: Mapping[str, ModelConfig], key: str) -> ModelConfig | None:
    """Returns the model that a stage trains. Raises ConfigError, naming the stage's `key`, if `ranks` do not fit it.

    They must fit the stage's method too, and its way to sample. `made` has the models of earlier stages by folder. The
    result is None if the model is not known yet, and then only the stage itself checks its layout.
    """
    init = getattr(config, "init", None)
    run = init.run if init and init.run else ""
    model = getattr(config, "model", None) or made.get(run) or (model_of(newest_manifest(run)) if run else None)
    parallel, train = getattr(config, "parallel", None), getattr(config, "train", None)
    if not (isinstance(model, ModelConfig) and parallel and train):
        return None
    groups = getattr(config, "grpo", None) or getattr(config, "ppo", None)
    try:
        check_method(config, Layout.of(ranks, parallel, model, train, groups.group_size if groups else 1))
    except ConfigError as error:
        raise ConfigError(f"{key} on {ranks} ranks: {error}") from None
    return model


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
    """Hash of a result that stages start from: of the newest checkpoint's manifest, else of `mark` or of `MARKS`.

    Of a Hugging Face folder it is that of all its files, since nothing in it has their checksums.
    """
    newest = newest_manifest(folder)
    if not newest and not mark and (folder / "config.json").is_file():
        found = sorted(file for pattern in OF_MODELS for file in folder.glob(pattern))
        return hashlib.sha256("".join(f"{file.name} {file_sha256(file)}\n" for file in found).encode()).hexdigest()
    files = [newest] if newest else [folder / name for name in ([mark] if mark else MARKS)]
    return next((file_sha256(path) for path in files if path.is_file()), None)


def tree_hash(tree: Mapping[str, Any]) -> str:
    """Hash of a config's tree, whatever its comments and layout."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()
