"""The base of a checkpoint that holds only what was trained: the model with the weights that it leaves out.

It is a checkpoint, an imported model or a Hugging Face folder, known by its SHA-256. The run keeps its files, as hard
links, which take no space, so that the base may be moved, pruned or deleted. Where they cannot be linked, it is found
where it was, or where it lies beside a run that was moved together with it, and the run that made it is told to keep
it.
"""

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.files import file_sha256
from configs.train import TrainerConfig
from pretrain.checkpoint import pruning, storage
from pretrain.checkpoint.lineage import Pin
from pretrain.checkpoint.storage import CheckpointError

FOLDER = "base"  # where a run keeps the files of its bases


def base_facts(config: TrainerConfig, init: Pin | None) -> dict[str, Any] | None:
    """Returns the entry that names the base in manifests of checkpoints without frozen weights, else None."""
    if init is None or not (config.adapter or config.train.freeze):
        return None
    return named_base(init, Path(config.run.dir))


def named_base(pin: Pin, run_dir: Path) -> dict[str, Any]:
    """Returns the entry by which a run's manifests name the model of `pin` as the base."""
    return {**asdict(pin), "relative": os.path.relpath(Path(pin.checkpoint).resolve(), run_dir.resolve())}


def base_of(path: Path, manifest: dict[str, Any]) -> Path | None:
    """Returns the base of the checkpoint at `path`, or None if it holds the whole model by itself.

    Raises CheckpointError if the base is gone or has changed.
    """
    base = manifest.get("base")
    if not base:
        return None
    first = Path(base["checkpoint"])
    candidates = [first]
    for run in (storage.run_of(path), storage.run_of(path.resolve().parent)):  # a critic is in a checkpoint's folder
        candidates += [Path(os.path.normpath(run / base["relative"])), _kept(run, base)]
    for candidate in candidates:
        if content_of(candidate) == base["sha256"]:
            return candidate
    said = "is another model now" if content_of(first) else "is gone"
    raise CheckpointError(
        f"{path} holds only what was trained on top of {first}, which {said}; put the model back there, whose "
        f"SHA-256 begins with {base['sha256'][:12]}"
    )


def keep_bases(
    run_dir: Path, bases: Iterable[dict[str, Any] | None], say: Callable[[str], None], mirror: str | None = None
) -> None:
    """Keeps the files of bases in the run, with those of their own bases; says so where that is not possible.

    `mirror` is the mirror of the run's checkpoints; it gets no copy of these files, and `say` tells the user so.
    """
    for base in filter(None, bases):
        if mirror:
            say(
                f"note: {mirror} gets no copy of {base['checkpoint']}, whose weights this run does not train; to go on "
                "from there without this folder, keep that model where it is"
            )
        path = base_of(run_dir / "checkpoints" / "next", {"base": base})
        try:
            _keep(run_dir, base, path)
        except OSError as error:
            say(
                f"note: the weights that are not trained stay in {base['checkpoint']}, which has to be kept: its files "
                f"cannot be linked into {run_dir} ({error.strerror})"
            )
            while path is not None:
                pruning.tell_use(path, run_dir, say)
                path = base_of(path, storage.read_manifest(path)) if (path / storage.MANIFEST).is_file() else None


def _keep(run_dir: Path, base: dict[str, Any], path: Path | None) -> None:
    """Links the files of the model in `path` into the run. Raises OSError if they cannot be linked."""
    kept = _kept(run_dir, base)
    if path is None or kept.is_dir():
        return
    temporary = kept.with_name(f".{kept.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for file in _files_of(path):
            os.link(file.resolve(), temporary / file.name)
        if (path / storage.MANIFEST).is_file() and (further := storage.read_manifest(path).get("base")):
            _keep(storage.run_of(kept), further, base_of(path, {"base": further}))
        os.rename(temporary, kept)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _kept(run_dir: Path, base: dict[str, Any]) -> Path:
    """Returns where a run keeps the files of a base: in a folder that is laid out as a run."""
    return run_dir / FOLDER / base["sha256"][:12] / "checkpoints" / f"step_{base['step']}"


def _files_of(model: Path) -> list[Path]:
    """Returns the files of a checkpoint, or of a Hugging Face folder, that hold its weights or describe them."""
    if (model / storage.MANIFEST).is_file():
        return [model / storage.MANIFEST, *(model / name for name in storage.read_manifest(model)["files"])]
    from export.hf_folder import weight_files

    return weight_files(model)


def content_of(model: Path) -> str | None:
    """Returns a hash that identifies the content of a checkpoint or a Hugging Face folder; None if neither is there."""
    if (model / storage.MANIFEST).is_file():
        return file_sha256(model / storage.MANIFEST)
    if not (model / "config.json").is_file():
        return None
    from export.hf_folder import content_sha256

    return content_sha256(model)
