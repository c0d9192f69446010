"""Names of the folders in which a run keeps its checkpoints, and which there are.

Torch is not imported, so that a run without checkpoints is told at once.
"""

import json
from pathlib import Path
from typing import Any

from configs.initial import InitConfig
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.section import Section

MANIFEST = "manifest.json"  # written last


def directory(run_dir: str | Path, step: int) -> Path:
    """Path of a run's checkpoint of `step`."""
    return Path(run_dir) / "checkpoints" / f"step_{step}"


def steps(run_dir: str | Path) -> list[int]:
    """Lists the steps of all checkpoints of a run, ascending."""
    found = (Path(run_dir) / "checkpoints").glob("step_*")
    return sorted(int(p.name[5:]) for p in found if p.name[5:].isdecimal())


def newest_manifest(run_dir: str | Path) -> Path | None:
    """Path of the manifest of a run's newest checkpoint that has one; None if it has no checkpoint."""
    manifests = (directory(run_dir, step) / MANIFEST for step in reversed(steps(run_dir)))
    return next((path for path in manifests if path.is_file()), None)


def model_of(manifest: Path | None) -> ModelConfig | None:
    """Returns the model that a checkpoint's manifest describes; None if it cannot be read, or if there is none."""
    try:
        return validate(ModelConfig, json.loads(manifest.read_bytes())["config"]["model"]) if manifest else None
    except (OSError, ValueError, KeyError, TypeError):  # whoever reads the checkpoint says what is wrong with it
        return None


def check_named(init: InitConfig) -> None:
    """Raises ConfigError if what `init` names does not exist, has no checkpoint, or is a folder of another kind."""
    section, path = init.section, Path(init.checkpoint or init.run or init.hf or "")
    is_checkpoint, is_run = (path / MANIFEST).is_file(), (path / "checkpoints").is_dir()
    is_hf = not is_run and (path / "config.json").is_file()
    if init.hf is not None and is_run and not (path / "config.json").is_file():
        raise ConfigError(
            f"{init.said} is a run or an imported model, not a Hugging Face folder; set {section}.run={path} and leave "
            f"{section}.hf out (as an override: {section}.hf=)"
        )
    if init.run is not None and (is_checkpoint or is_hf):
        kind, key = ("checkpoint", "checkpoint") if is_checkpoint else ("Hugging Face folder", "hf")
        raise ConfigError(
            f"{init.said} is a {kind}, not a run; set {section}.{key}={path} and leave {section}.run out (as an "
            f"override: {section}.run=)"
        )
    if init.run is not None and not steps(path):
        raise ConfigError(f"{init.said}: {path} has no checkpoint; train first, or name another run")
    if init.checkpoint is not None and is_run:
        own = [str(directory(path, step)) for step in steps(path)[-1:]]
        remedy = f"set {section}.checkpoint={own[0]}" if own else "it has none yet, so train first"
        raise ConfigError(f"{init.said} is a run, not a checkpoint; {remedy}")
    if init.checkpoint is not None and not path.is_dir():
        saved = ", ".join(f"step_{step}" for step in steps(path.parent.parent))
        raise ConfigError(f"{init.said} does not exist; checkpoints in {path.parent} are {saved or 'none'}")
    if init.hf is not None and not path.is_dir():
        raise ConfigError(f"{init.said} does not exist; name a Hugging Face model directory")


class OnlyInit(Section):
    """A config of which only the section [init] is read."""

    init: InitConfig
    """The model to start from."""


def check_start(tree: dict[str, Any], resume: str = "auto") -> None:
    """Checks what a config's [init] names, see `check_named`, if its run is a new one, which begins from that model.

    `resume` is the option --resume. Raises ConfigError as `check_named`, or if [init] itself is wrong.
    """
    run, init = tree.get("run"), tree.get("init")
    if not init or resume not in ("auto", "no") or not (isinstance(run, dict) and isinstance(run.get("dir"), str)):
        return
    if not steps(run["dir"]):
        check_named(validate(OnlyInit, {"init": init}).init)
