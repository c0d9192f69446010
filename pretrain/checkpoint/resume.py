"""Chooses the checkpoint that a run starts from, by `--resume auto | no | PATH`, and checks that it fits the run.

auto: the newest whole checkpoint of the run; if it has none, a new start.
no:   a new start; a run directory with checkpoints is refused.
PATH: that checkpoint, of this run or of another one with the same identity. When the same command is started again,
      the run continues from its own newest checkpoint. A run directory with checkpoints that do not come from PATH is
      refused, since they would be overwritten.

The engine is filled by `state.restore`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from configs.adapters import AdapterConfig
from configs.differences import Changes, changes, words
from configs.loader import ConfigError, plain, validate
from configs.model import ModelConfig
from configs.train import TrainerConfig
from pretrain.checkpoint import local_gathering, storage
from pretrain.checkpoint.fetching import Fetcher, Fits, fetch_share
from pretrain.checkpoint.lineage import Lineage, Pin, text_sha256, tokenizer_difference
from pretrain.checkpoint.local_disk import LocalDisk
from pretrain.checkpoint.local_gathering import LocalGatherer
from pretrain.checkpoint.storage import CheckpointError
from pretrain.checkpoint.whole_model import verify
from pretrain.data.batch_source import BatchSource
from pretrain.parallel.groups import Mesh


def identity_of(config: TrainerConfig, model: ModelConfig, source: BatchSource, lineage: Lineage) -> dict[str, Any]:
    """Returns what may not change while a run goes on, as its checkpoints keep it."""
    return {
        "model": plain(model),
        "seed": config.run.seed,
        "seq_length": config.train.seq_length,
        "data": source.fingerprint,
        "freeze": list(config.train.freeze),
        "adapter": config.adapter and plain(config.adapter),
        **lineage.identity,
    }


def check_ranks(
    mesh: Mesh, config: Mapping[str, Mapping[str, Any]], identity: Mapping[str, Any], init: Pin | None
) -> None:
    """Raises ConfigError on all ranks unless all have the same settings, data and initial checkpoint.

    Every rank reads config and data by itself; the files may change between their reads, or differ between nodes.
    """
    mine = {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
    mine |= {_WORDS.get(key, f"{key} of the run"): value for key, value in identity.items()}
    hashes = mesh.gather_json([text_sha256(json.dumps(value, default=str)) for value in mine.values()])
    different = [key for key, found in zip(mine, zip(*hashes, strict=True), strict=True) if len(set(found)) > 1]
    if _WORDS["init"] in different and init is not None:
        raise ConfigError(
            f"the ranks found different newest checkpoints of the run to begin from, {init.checkpoint} among them, "
            "because that run is still training: set init.checkpoint to one of them, or start again"
        )
    if "train.precision" in different:
        raise ConfigError("train.precision = 'auto' chooses bf16 on some ranks and fp32 on others; set one of them")
    if different:
        raise ConfigError(
            f"the ranks do not have the same {', '.join(different)}: files that they read were replaced while they "
            "started, or differ between nodes; make them the same everywhere and start again"
        )


def choose(
    mesh: Mesh,
    run_dir: Path,
    resume: str,
    before: int | None = None,
    mirror: str | None = None,
    fits: Fits | None = None,
    local: LocalDisk | None = None,
) -> Path | None:
    """Returns the checkpoint to start from, the same on every rank, or None for a new start.

    With `before` it is one of an earlier step than that, to which a run goes back. If `mirror` has a later one than the
    run's folder, it is fetched first; `fits` raises ConfigError if a manifest is that of another run. If the nodes'
    disks (`local`) have a later one, it is gathered first.

    The main rank looks for it and prints a warning for each damaged checkpoint that it skips. To check a checkpoint it
    asks all ranks, each of which reads its share of the files. Raises ConfigError or CheckpointError, on all ranks, if
    the request cannot be met.
    """
    if local:
        local.open(begins_anew=resume != "auto")
    if mesh.is_main:
        answer: dict[str, Any] = {"path": None, "refused": None, "damaged": None}
        try:
            fetcher = Fetcher(mesh, run_dir, mirror, fits) if mirror and fits else None
            gatherer = LocalGatherer(local) if local and before is None else None
            path = _choose(run_dir, resume, partial(_check_together, mesh), before, fetcher, gatherer)
            answer["path"] = str(path) if path else None
        except ConfigError as error:
            answer["refused"] = str(error)
        except CheckpointError as error:
            answer["damaged"] = str(error)
        mesh.gather_json(answer)
    else:
        while (answer := mesh.gather_json(None)[0]).keys() & {"check", "fetch", "local"}:
            mesh.gather_json(_share(mesh, answer, local))
    if answer["refused"]:
        raise ConfigError(answer["refused"])
    if answer["damaged"]:
        raise CheckpointError(answer["damaged"])
    return Path(answer["path"]) if answer["path"] else None


def _share(mesh: Mesh, request: dict[str, Any], local: LocalDisk | None) -> Any:
    """Does this rank's share of what the main rank asks all for, and returns its answer."""
    if "fetch" in request:
        return fetch_share(mesh.rank, request)
    if local and "local" in request:
        return local_gathering.answer(local, request)
    return _fault_in_share(mesh, Path(request["check"]))


def _check_together(mesh: Mesh, path: Path) -> None:
    """Checks a checkpoint with the help of all ranks, which wait for it in `choose`. Raises CheckpointError."""
    storage.read_manifest(path)
    mesh.gather_json({"check": str(path)})
    check_whole(mesh, path)


def check_whole(mesh: Mesh, path: Path) -> None:
    """Checks a checkpoint, of whose files each rank reads a share. Collective; raises CheckpointError on all ranks."""
    faults = mesh.gather_json(_fault_in_share(mesh, path))
    if fault := next(filter(None, faults), None):
        raise CheckpointError(fault)


def _fault_in_share(mesh: Mesh, path: Path) -> str | None:
    """Checks this rank's share of a checkpoint's files; returns the first fault found, if any."""
    try:
        verify(path, (mesh.rank, mesh.layout.world_size))
    except (CheckpointError, ConfigError) as error:
        return str(error)
    except OSError as error:
        return f"rank {mesh.rank} cannot read {error.filename or path}: {error.strerror}; use an earlier checkpoint"
    return None


def check_identity(
    path: Path | str,
    manifest: dict[str, Any],
    identity: dict[str, Any],
    source: BatchSource,
    config: Mapping[str, Any],
    lineage: Lineage | None = None,
) -> None:
    """Refuses the checkpoint of a run that trains another model, on other data, or from another seed.

    `config` and `lineage` are the run's; where data differ, its keys that decide them and have changed are named.
    Settings that only training uses may change, also those in model.moe. If the plan of `source` continues exactly
    where the checkpoint's own plan ended, the length of rows and the base of the rotary embedding may change as well,
    as training on longer context needs.
    """
    if "train" not in manifest["config"]:
        raise ConfigError(
            f"{path} is an imported model, not a checkpoint of a run; set init.run={storage.run_of(Path(path))} and "
            "another run.dir"
        )
    found = manifest.get("identity", {})
    data, samples = found.get("data"), manifest["samples"]
    passes_on = source.after is not None and data == source.after
    known = data == source.fingerprint or samples <= source.common_samples.get(data, -1)
    if source.after and not passes_on and not known:
        raise ConfigError(
            f"data.plan = {source.location!r} goes on after another plan than the one that {path} was trained on; "
            "train stages in their order, or choose another run.dir"
        )
    if passes_on and samples != source.first_sample:
        rest, batch = source.first_sample - samples, config["train"]["global_batch_size"]
        reached = rest > 0 and rest % batch == 0
        first = f"train to there first, on the plan before, with train.steps={manifest['step'] + rest // batch}, or "
        raise ConfigError(
            f"{path} has used {samples:,} samples, and data.plan = {source.location!r} goes on after "
            f"{source.first_sample:,}{'' if reached else f', where no step of {batch} samples ends'}; "
            f"{first if reached else ''}make a plan that goes on from it: "
            f"trivium data replan CONFIG --after {path} --out FOLDER"
        )
    # A key that the checkpoint does not have is newer than it, and was not set.
    before = {"freeze": [], **found, "adapter": _whole_adapter(path, found)}
    differing = {key: (before[key], ours) for key, ours in identity.items() if key in before and before[key] != ours}
    if passes_on or known:
        differing.pop("data", None)
    if passes_on:
        differing.pop("seq_length", None)
    said = []
    for key, (then, now) in differing.items():
        if key == "model":
            free = ("position.theta",) if passes_on else ()
            said += words(model_changes(f"the model of {path}", then, now, free))
        elif key == "data":
            difference = source.difference(_facts(manifest))
            said += [line for line in _data_keys(manifest["config"], config) if line not in difference]
            said.append(f"its data differ: {difference}")
        elif key == "adapter" and then and now:
            said += words({f"adapter.{name}": pair for name, pair in changes(then, now).items()})
        elif key == "adapter":
            said.append(f"section adapter, of kind {(now or then)['kind']}, is {'new' if now else 'gone'}")
        elif key in _WORDS:
            line = f"{_WORDS[key]} {'differ' if key == 'roles' else 'differs'}"
            said += [] if any(line in other for other in said) else [line]
        else:
            said += words({_CONFIG_KEYS.get(key, key): (then, now)})
    of_tokens = differing.keys() & {"tokenizer", "roles"}
    if lineage and of_tokens:
        said += filter(None, [tokenizer_difference(lineage, Path(path), manifest)])
    if said:
        go_on = ""
        if "data" in differing and "mixture" in _facts(manifest) and source.location and not of_tokens:
            go_on = f", make a plan that goes on from it (trivium data replan CONFIG --after {path} --out FOLDER)"
        raise ConfigError(
            f"{path} was trained with other settings than this config: {'; '.join(said)}; set it back{go_on}, or "
            "choose another run.dir to start from the beginning"
        )


def _whole_adapter(path: Path | str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the [adapter] section of a checkpoint, with the defaults of keys that are newer than it."""
    adapter = identity.get("adapter")
    return adapter and plain(validate(AdapterConfig, adapter, origin=f"{path}, [adapter]"))


# Keys of model.moe that training alone uses: the model's output does not depend on them.
_TRAINING_ONLY = ("aux_loss", "aux_loss_coef", "z_loss_coef", "bias_update_rate", "capacity_factor")
_WORDS = {
    "init": "the checkpoint that it begins from",
    "tokenizer": "the tokenizer",
    "roles": "the roles of the tokenizer's tokens",
    "chat_template": "the chat format",
}
# Sections, and keys of others, that decide which data there are, and keys of these sections that do not.
_OF_DATA = ("data", "task", "teacher", "reward_model.kind", "reward_model.margin", "reward_model.separator")
_NOT_OF_DATA = ("data.plan", "data.text_plan", "task.eval_prompts", "data.max_bad_share")
_CONFIG_KEYS = {"seed": "run.seed", "seq_length": "train.seq_length", "freeze": "train.freeze"}


def model_changes(
    origin: str, before: dict[str, Any], now: dict[str, Any], free: Sequence[str], starts: bool = False
) -> Changes:
    """Returns each key `model.KEY` that has changed but may not; a key that `before` lacks had its default.

    The keys in `free` may change, and so may those of training alone, unless a run that goes on would need other
    balancing state than `before` has, or a run that `starts` from that model would lose its router bias.
    """
    old = validate(ModelConfig, before, origin=origin)
    new = validate(ModelConfig, now)
    found = changes(plain(old), plain(new))
    if old.moe and new.moe:
        kept = ("bias" in old.moe.state()) == ("bias" in new.moe.state())
        if kept if starts else old.moe.state() == new.moe.state():
            free = [*free, *(f"moe.{key}" for key in _TRAINING_ONLY)]
    return {f"model.{key}": pair for key, pair in found.items() if key not in free}


def _data_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Says which keys that decide the data differ in two configs; a section that only one has is named alone."""
    said = []
    for name in _OF_DATA:
        section, _, key = name.partition(".")
        then, ours = before.get(section), now.get(section)
        if then and ours:
            parts = [{section: {key: one.get(key)} if key else one} for one in (then, ours)]
            said += words({key: pair for key, pair in changes(*parts).items() if key not in _NOT_OF_DATA})
        elif (then or ours) and not key:
            said.append(f"section {name} is {'new' if ours else 'gone'}")
    return said


def _facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts of the data that the checkpoint was last trained on; empty if its manifest has none."""
    data_spans = manifest.get("data_spans") or [{}]
    return dict(data_spans[-1].get("facts", {}))


def choose_alone(run_dir: Path, resume: str) -> Path | None:
    """Returns what `choose` would from the run's folder alone, in one process. Raises as `choose`."""
    return _choose(run_dir, resume, verify, None, None, None)


def _choose(
    run_dir: Path,
    resume: str,
    check: Callable[[Path], object],
    before: int | None,
    fetcher: Fetcher | None,
    gatherer: LocalGatherer | None,
) -> Path | None:
    if resume == "no":
        if steps := storage.steps(run_dir):
            raise ConfigError(
                f"{run_dir} holds checkpoints, the newest of step {steps[-1]}, which --resume no would overwrite; "
                f"choose another run.dir, remove {run_dir / 'checkpoints'}, or leave --resume out to go on"
            )
        if fetcher:
            fetcher.check_is_new()
        return None
    own, problems = storage.find_newest(run_dir, check, before)
    for problem in problems:
        print(f"warning: {problem}", flush=True)
    if gatherer:
        own = gatherer.gather_newer(own) or own
    if fetcher:
        own = fetcher.fetch_newer(own) or own
    if own is None and problems:
        raise CheckpointError(
            f"no checkpoint of {run_dir} is whole; restore one, or choose another run.dir to start from the beginning"
        )
    if resume == "auto":
        return own
    if own is None:
        return _named(resume, check)
    if str(Path(resume).resolve()) in (str(own.resolve()), storage.read_manifest(own).get("origin")):
        return own
    named = _named(resume, check)
    raise ConfigError(
        f"--resume {named}: {run_dir} holds checkpoints that do not come from it, the newest {own}; choose another "
        f"run.dir for the new branch, remove them, or leave --resume out to go on from {own.name}"
    )


def origin_of(path: Path, run_dir: Path) -> str | None:
    """Returns the checkpoint of another run that this run was started from by `--resume PATH`, if it was, else None."""
    if path.resolve().parent != (run_dir / "checkpoints").resolve():
        return str(path.resolve())
    origin = storage.read_manifest(path).get("origin")
    return None if origin is None else str(origin)


def _named(resume: str, check: Callable[[Path], object]) -> Path:
    """Returns the checkpoint that `--resume` names. Raises ConfigError if there is none or it is damaged."""
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        steps = storage.steps(path)
        example = storage.directory(path, steps[-1]) if steps else path / "checkpoints/step_N"
        raise ConfigError(f"--resume {resume} is a run, not a checkpoint; name one of its checkpoints, e.g. {example}")
    if not path.is_dir():
        raise ConfigError(
            f"--resume {resume}: there is no such checkpoint; give auto, no, or a path like RUN/checkpoints/step_N"
        )
    try:
        check(path)
    except CheckpointError as error:
        raise ConfigError(f"--resume {resume}: {error}") from None
    return path
