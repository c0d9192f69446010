"""Which checkpoint a run starts from: `--resume auto | no | PATH`.

auto: the newest whole checkpoint of the run; a new start where there is none.
no:   a new start; a run directory with checkpoints is refused.
PATH: that checkpoint, of this run or of another one with the same identity. Started again by the same command, the run
      goes on from its own newest checkpoint. A run directory with checkpoints that do not come from PATH is refused:
      they would be overwritten.

Leaves out filling the engine (`state.restore`).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.differences import Changes, changes, words
from configs.loader import ConfigError, plain, validate
from configs.train import ModelConfig
from pretrain.batch_source import BatchSource
from pretrain.checkpoint import storage
from pretrain.checkpoint.lineage import Pin, text_sha256
from pretrain.checkpoint.storage import CheckpointError
from pretrain.parallel.groups import Mesh


def check_ranks(
    mesh: Mesh, config: Mapping[str, Mapping[str, Any]], identity: Mapping[str, Any], init: Pin | None
) -> None:
    """Errors: ConfigError, on all ranks together, unless all have the same settings, data and beginning.

    Each rank looks for itself, and what it sees may change meanwhile, or be another on some node.
    """
    mine = {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
    mine |= {_OTHERS.get(key, f"{key} of the run"): value for key, value in identity.items()}
    hashes = mesh.gather_json([text_sha256(json.dumps(value, default=str)) for value in mine.values()])
    different = [key for key, found in zip(mine, zip(*hashes, strict=True), strict=True) if len(set(found)) > 1]
    if _OTHERS["init"] in different and init is not None:
        raise ConfigError(
            f"the ranks found different newest checkpoints of the run to begin from, {init.checkpoint} among them, "
            "since it is training: name one by init.checkpoint, or start again"
        )
    if "train.precision" in different:
        raise ConfigError("train.precision = 'auto' is another on some ranks' devices; set it to bf16 or fp32")
    if different:
        raise ConfigError(
            f"the ranks do not have the same {', '.join(different)}: files that they read were replaced while they "
            "started, or are others on some node; start again when they are the same everywhere"
        )


def choose(mesh: Mesh, run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to start from, the same on every rank; None for a new start. Errors: ConfigError, CheckpointError.

    The main rank looks, and warns of checkpoints that it passes over.
    """
    answer: dict[str, Any] = {"path": None, "refused": None, "damaged": None}
    if mesh.is_main:
        try:
            path = _choose(run_dir, resume)
            answer["path"] = str(path) if path else None
        except ConfigError as error:
            answer["refused"] = str(error)
        except CheckpointError as error:
            answer["damaged"] = str(error)
    answer = mesh.gather_json(answer)[0]
    if answer["refused"]:
        raise ConfigError(answer["refused"])
    if answer["damaged"]:
        raise CheckpointError(answer["damaged"])
    return Path(answer["path"]) if answer["path"] else None


def check_identity(path: Path, manifest: dict[str, Any], identity: dict[str, Any], source: BatchSource) -> None:
    """Refuses the checkpoint of a run that trains another model, on other data, or from another seed.

    Settings of training alone may change, those in model.moe among them. Where `source` goes on exactly where the
    checkpoint left its own data, rows may have another length from there on, and rotary embedding another base, as
    training on longer context wants.
    """
    found = manifest.get("identity", {})
    data, samples = found.get("data"), manifest["samples"]
    passes_on = source.after is not None and data == source.after
    known = data == source.fingerprint or samples <= source.same.get(data, -1)
    if source.after and not passes_on and not known:
        raise ConfigError(
            f"data.plan = {source.location!r} goes on after another plan than the one that {path} was trained on; "
            "train stages in their order, or choose another run.dir"
        )
    if passes_on and samples != source.first_sample:
        raise ConfigError(
            f"{path} has used {samples:,} samples, and data.plan = {source.location!r} goes on after "
            f"{source.first_sample:,}; train to there first, or make a plan that goes on from it: "
            f"trivium data replan CONFIG --after {path} --out FOLDER"
        )
    # A key that the checkpoint does not have is newer than it.
    differing = {key: (found[key], ours) for key, ours in identity.items() if key in found and found[key] != ours}
    if passes_on or known:
        differing.pop("data", None)
    if passes_on:
        differing.pop("seq_length", None)
    said = []
    for key, (before, now) in differing.items():
        if key == "model":
            said += words(_model_changes(path, before, now, ("rope_theta",) if passes_on else ()))
        elif key == "data":
            said.append(f"its data are others: {source.difference(_facts(manifest))}")
        elif key in _OTHERS:
            said.append(f"{_OTHERS[key]} is another")
        else:
            said += words({_KEYS.get(key, key): (before, now)})
    if said:
        go_on = ""
        if "data" in differing and source.location:
            go_on = f", make a plan that goes on from it (trivium data replan CONFIG --after {path} --out FOLDER)"
        raise ConfigError(
            f"{path} was trained otherwise than this config says: {'; '.join(said)}; set it back{go_on}, or choose "
            "another run.dir to start anew"
        )


# Of model.moe, what counts in training alone, and not in what the model computes.
_TRAINING_ONLY = ("aux_loss", "aux_loss_coef", "z_loss_coef", "bias_update_rate", "capacity_factor")
_OTHERS = {
    "init": "the checkpoint that it begins from",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat format",
}
_KEYS = {"seed": "run.seed", "seq_length": "train.seq_length"}


def _model_changes(path: Path, before: dict[str, Any], now: dict[str, Any], free: Sequence[str]) -> Changes:
    """Keys of two models that may not change, `model.KEY`. The earlier one gets the defaults of newer keys first."""
    old = validate(ModelConfig, before, origin=f"the model of {path}")
    new = validate(ModelConfig, now)
    found = changes(plain(old), plain(new))
    if old.moe and new.moe and old.moe.state() == new.moe.state():
        free = [*free, *(f"moe.{key}" for key in _TRAINING_ONLY)]
    return {f"model.{key}": pair for key, pair in found.items() if key not in free}


def _facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint's last data were; empty if it does not say."""
    data_spans = manifest.get("stretches") or [{}]
    return dict(data_spans[-1].get("facts", {}))


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
