"""The state with which a training run begins or goes on: that of a checkpoint, or of a new model."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.loader import ConfigError
from pretrain.checkpoint import resume, state, storage
from pretrain.data.batch_source import check_samples
from pretrain.run.initial_model import initial_weights

if TYPE_CHECKING:
    from pretrain.trainer import Trainer


def load_weights(trainer: "Trainer") -> Path | None:
    """Loads the checkpoint that the run continues from and returns its folder; None for a new run.

    A new run loads the weights of `lineage.init` if there are any, else it keeps its random weights.
    """
    train = trainer.config.train
    resume.check_ranks(trainer.mesh, trainer.run.full_config, trainer.identity, trainer.lineage.init)
    path = resume.choose(
        trainer.mesh,
        trainer.run.path,
        trainer.resume,
        mirror=trainer.config.checkpoint.mirror,
        fits=partial(_check_identity, trainer),
        local=trainer.run.local,
        begins=partial(_check_begins, trainer),
    )
    if path is None:
        _check_begins(trainer)
        trainer.rewinds.begin(None)
        _check_samples(trainer)
        _begin_local(trainer)
        if trainer.lineage.init:
            with initial_weights(trainer.lineage.init) as tensors:
                for name in state.begin_from(trainer.engine, tensors):
                    trainer.print(f"{name} is not in {tensors.path} and begins with random values")
        if trainer.companion:
            trainer.companion.begin()
        return None
    manifest = storage.read_manifest(path)
    _check_identity(trainer, path, manifest)
    if manifest["step"] < train.steps:
        state.restore(trainer.engine, path)
        for name, engine in trainer.beside.items():
            state.restore(engine, path / name)
        trainer.print(f"going on from {path}")
    trainer.rewinds.begin(manifest)
    checked = trainer.mesh.gather_json((path / storage.CHECKED).exists())[0]
    trainer.agreement.unchecked_from = manifest["step"]
    if not checked:
        trainer.agreement.unchecked_from = manifest.get("unchecked_from", manifest["step"])
    trainer.context = max(trainer.context, manifest.get("context", 0))
    trainer.origin = resume.origin_of(path, trainer.run.path)
    take_up(trainer, path, manifest)
    _begin_local(trainer)
    return path


def _check_begins(trainer: "Trainer") -> None:
    """Raises ConfigError if a run that is new cannot train on its data."""
    if trainer.source.after:
        raise ConfigError(
            f"data.plan = {trainer.source.location!r} continues another plan after its first "
            f"{trainer.source.first_sample:,} samples, but this run is new: train on that plan first, or name a "
            "checkpoint of such a run with --resume"
        )
    check_samples(trainer.source, trainer.config.train, 0, 0)


def _begin_local(trainer: "Trainer") -> None:
    """Begins a start on the nodes' disks, once the run is known to go on from where it is."""
    if trainer.run.local:
        trainer.run.local.begin(trainer.step)


def take_up(trainer: "Trainer", path: Path, manifest: dict[str, Any]) -> None:
    """Takes up the counts and the history of the checkpoint that training goes on from."""
    trainer.step, trainer.samples, trainer.tokens = manifest["step"], manifest["samples"], manifest["tokens"]
    trainer.tokens_by_source |= manifest.get("ledger", {})
    trainer.spikes.restore(manifest.get("spikes", {}))
    trainer.run.take_data_spans(manifest)
    _check_samples(trainer, path)
    if trainer.step < trainer.config.train.steps:
        trainer.source.go_on(path, manifest)


def _check_identity(trainer: "Trainer", path: Path | str, manifest: dict[str, Any]) -> None:
    resume.check_identity(path, manifest, trainer.identity, trainer.source, trainer.run.full_config)


def _check_samples(trainer: "Trainer", path: Path | None = None) -> None:
    train = trainer.config.train
    passed = trainer.rewinds.passed_over(trainer.samples, train.global_batch_size, train.steps - trainer.step)
    check_samples(trainer.source, train, trainer.step, trainer.samples, path, passed)
