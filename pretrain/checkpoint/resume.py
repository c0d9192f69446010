"""Which checkpoint a run starts from: `--resume auto | no | PATH`.

auto: the newest whole checkpoint of the run; a new start where there is none.
no:   a new start; a run directory with checkpoints is refused.
PATH: that checkpoint, of this run or of another one with the same identity. Started again by the same command, the run
      goes on from its own newest checkpoint. A run directory with checkpoints that do not come from PATH is refused:
      they would be overwritten.

Leaves out filling the engine (`state.restore`).
"""

from pathlib import Path
from typing import Any

from configs.loader import ConfigError
from pretrain.checkpoint import storage
from pretrain.checkpoint.storage import CheckpointError
from pretrain.data import BatchSource
from pretrain.parallel.groups import Place


def choose(place: Place, run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to start from, the same on every rank; None for a new start. Errors: ConfigError, CheckpointError.

    The main rank looks, and warns of checkpoints that it passes over.
    """
    answer: dict[str, Any] = {"path": None, "refused": None, "damaged": None}
    if place.is_main:
        try:
            path = _choose(run_dir, resume)
            answer["path"] = str(path) if path else None
        except ConfigError as error:
            answer["refused"] = str(error)
        except CheckpointError as error:
            answer["damaged"] = str(error)
    answer = place.gather_json(answer)[0]
    if answer["refused"]:
        raise ConfigError(answer["refused"])
    if answer["damaged"]:
        raise CheckpointError(answer["damaged"])
    return Path(answer["path"]) if answer["path"] else None


def check_identity(path: Path, manifest: dict[str, Any], identity: dict[str, Any], source: BatchSource) -> None:
    """Refuses the checkpoint of a run that trains another model, on other data, or from another seed.

    Where `source` goes on exactly where the checkpoint left its own data, rows may have another length from there on,
    and rotary embedding another base, as training on longer context wants.
    """
    found = manifest.get("identity", {})
    passes_on = source.after is not None and found.get("data") == source.after
    if source.after and found.get("data") not in (source.after, source.fingerprint):
        raise ConfigError(
            f"data.plan = {source.location!r} goes on after another plan than the one that {path} was trained on; "
            "train stages in their order, or choose another run.dir"
        )
    if passes_on and manifest["samples"] != source.first_sample:
        raise ConfigError(
            f"{path} has used {manifest['samples']:,} samples, and data.plan = {source.location!r} goes on after "
            f"{source.first_sample:,}; train to there first, or make a plan that goes on from it: "
            f"trivium data replan CONFIG --after {path} --out FOLDER"
        )
    if passes_on:
        found = found | {key: identity[key] for key in ("data", "seq_length")}
        found["model"] = found["model"] | {"rope_theta": identity["model"]["rope_theta"]}
    for key, ours in identity.items():
        theirs = found.get(key)
        if theirs != ours:
            raise ConfigError(
                f"{path} was trained with {key} = {_difference(theirs, ours)}, this config says "
                f"{_difference(ours, theirs)}; set it back, or choose another run.dir to start anew"
            )


def _choose(run_dir: Path, resume: str) -> Path | None:
    if resume == "no":
        if steps := storage.steps(run_dir):
            raise ConfigError(
                f"{run_dir} holds checkpoints, the newest of step {steps[-1]}, and --resume no starts anew; choose "
                f"another run.dir, remove {run_dir / 'checkpoints'}, or leave --resume out to go on"
            )
        return None
    own, problems = storage.find_newest(run_dir)
    for problem in problems:
        print(f"warning: {problem}", flush=True)
    if own is None and problems:
        raise CheckpointError(
            f"no checkpoint of {run_dir} is whole; restore one, or choose another run.dir to start anew"
        )
    if resume == "auto":
        return own
    if own is None:
        return _named(resume)
    if str(Path(resume).resolve()) in (str(own.resolve()), storage.read_manifest(own).get("origin")):
        return own
    named = _named(resume)
    raise ConfigError(
        f"--resume {named}: {run_dir} holds checkpoints that do not come from it, the newest {own}; choose another "
        f"run.dir for the new branch, remove them, or leave --resume out to go on from {own.name}"
    )


def origin_of(path: Path, run_dir: Path) -> str | None:
    """Where the run's first checkpoint came from, if `--resume PATH` named one of another run."""
    if path.resolve().parent != (run_dir / "checkpoints").resolve():
        return str(path.resolve())
    origin = storage.read_manifest(path).get("origin")
    return None if origin is None else str(origin)


def _named(resume: str) -> Path:
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        steps = storage.steps(path)
        example = storage.directory(path, steps[-1]) if steps else path / "checkpoints/step_N"
        raise ConfigError(f"--resume {resume} is a run, not a checkpoint; name one of its checkpoints, e.g. {example}")
    if not path.is_dir():
        raise ConfigError(f"--resume {resume}: there is no such checkpoint; give auto, no, or a path like RUN/step_N")
    try:
        storage.verify(path)
    except CheckpointError as error:
        raise ConfigError(f"--resume {resume}: {error}") from None
    return path


def _difference(value: Any, other: Any) -> Any:
    """Of two dicts, what is particular to the first."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {k: v for k, v in value.items() if other.get(k) != v}
    return value
