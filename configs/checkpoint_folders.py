"""Names of the folders in which a run keeps its checkpoints, and which there are.

Torch is not imported, so that a run without checkpoints is told at once.
"""

import json
import re
from pathlib import Path
from typing import Any

from configs.initial import InitConfig
from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.section import Section

MANIFEST = "manifest.json"  # written last
_NUMBER = re.compile(r"\d+$")
_SHOWN = 8  # checkpoints of a run that a message names


def directory(run_dir: str | Path, step: int | str) -> Path:
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
    path = Path(init.checkpoint or init.run or init.hf or "")
    is_checkpoint, is_run = (path / MANIFEST).is_file(), (path / "checkpoints").is_dir()
    is_hf = not is_run and (path / "config.json").is_file()
    if init.hf is not None and not is_hf:
        _check_hf(init, path, is_checkpoint, is_run)
    if init.run is not None:
        if is_checkpoint or is_hf:
            kind, key = ("checkpoint", "checkpoint") if is_checkpoint else ("Hugging Face folder", "hf")
            raise ConfigError(f"{init.said} is a {kind}, not a run; {_set_instead(init, key, path)}")
        if not path.is_dir():
            fault = "is a file" if path.exists() else "does not exist"
            raise ConfigError(f"{init.said} {fault}; name the folder of a run, which has checkpoints")
        if steps(path.parent) and path.absolute() == (path.parent / "checkpoints").absolute():
            raise ConfigError(f"{init.said} is the folder of a run's checkpoints; set {init.named_by}={path.parent}")
        if not steps(path):
            raise ConfigError(f"{init.said}: {path} has no checkpoint; train first, or name another run")
    if init.checkpoint is not None and not is_checkpoint:
        raise ConfigError(f"{init.said} {_no_checkpoint(init, path, is_run, is_hf)}")


def _check_hf(init: InitConfig, path: Path, is_checkpoint: bool, is_run: bool) -> None:
    """Raises ConfigError if `path`, named as a Hugging Face folder and none, is something of Trivium's, or nothing."""
    if is_run and not (path / "config.json").is_file():
        said = "is a run or an imported model, not a Hugging Face folder"
        raise ConfigError(f"{init.said} {said}; {_set_instead(init, 'run', path)}")
    if is_checkpoint:
        raise ConfigError(
            f"{init.said} is a checkpoint, not a Hugging Face folder; {_set_instead(init, 'checkpoint', path)}"
        )
    if not path.is_dir():
        raise ConfigError(f"{init.said} does not exist; name a Hugging Face model directory")


def _no_checkpoint(init: InitConfig, path: Path, is_run: bool, is_hf: bool) -> str:
    """Says what `path`, named as a checkpoint and none, is, and what to name of the run that it is in."""
    if is_hf:
        return f"is a Hugging Face folder, not a checkpoint; {_set_instead(init, 'hf', path)}"
    if is_run:
        own = [newest.parent] if (newest := newest_manifest(path)) else []
        remedy = f"set {init.named_by}={own[0]}" if own else "it has none yet, so train first"
        return f"is a run, not a checkpoint; {remedy}"
    fault = "is no checkpoint" if path.exists() else "does not exist"
    run = next((folder for folder in path.parents if steps(folder)), None)
    if run is None:
        return f"{fault}, and no folder above it is a run; name one as RUN/checkpoints/step_N"
    saved, wanted = (
        [step for step in steps(run) if (directory(run, step) / MANIFEST).is_file()],
        _NUMBER.search(path.name),
    )
    if not saved:
        return f"{fault}, and no checkpoint of {run} has a {MANIFEST}; name another run's, as RUN/checkpoints/step_N"
    step = int(wanted[0]) if wanted and int(wanted[0]) in saved else saved[-1]
    more = f" and {len(saved) - _SHOWN} more" if len(saved) > _SHOWN else ""
    have = ", ".join(f"step_{one}" for one in saved[-_SHOWN:])
    return f"{fault}; checkpoints of {run} are {have}{more}: set {init.named_by}={directory(run, step)}"


def _set_instead(init: InitConfig, key: str, path: Path) -> str:
    """Says to name `path` by `key`, and to leave out the key that names it now."""
    now = init.named_by
    return f"set {init.section}.{key}={path} and leave {now} out (as an override: {now}=)"


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
