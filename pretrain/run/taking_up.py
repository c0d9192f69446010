"""The state with which a training run begins or goes on: that of a checkpoint, or of a new model."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.loader import ConfigError
from configs.train import TrainSection
from pretrain.checkpoint import resume, state, storage
from pretrain.checkpoint.fetching import claim_mirror
from pretrain.data.batch_source import BatchSource, check_samples
from pretrain.data.data_check import check_first
from pretrain.health.rewind_history import Rewinds
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
    )
    if path is None:
        trainer.rewinds.begin(None)
        check_begins(trainer.source, train, trainer.rewinds)
        _load_initial(trainer)
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
    return path


def load_weights_after(trainer: "Trainer", step: int) -> bool:
    """Loads the weights that the run has after `step` steps, while another process trains it. Collective.

    Returns False while the run has no checkpoint of that step. Raises ConfigError if that will not come, since the run
    has later ones already, or if it is of another run; CheckpointError if it is damaged.
    """
    if step == 0:
        _load_initial(trainer)
        return True
    mesh, path = trainer.mesh, storage.directory(trainer.run.path, step)
    there, steps = mesh.gather_json([path.exists(), storage.steps(trainer.run.path)])[0]
    if not there:
        if steps and steps[-1] > step:
            raise ConfigError(
                f"{path} is gone and the run is at step {steps[-1]}, so a rollout cannot be sampled with its weights; "
                "raise checkpoint.keep, and begin both commands anew with other folders"
            )
        return False
    resume.check_whole(mesh, path)
    _check_identity(trainer, path, storage.read_manifest(path))
    state.restore(trainer.engine, path)
    return True


def _load_initial(trainer: "Trainer") -> None:
    """Loads the weights that a new run begins with, if they are those of another run."""
    if trainer.lineage.init:
        with initial_weights(trainer.lineage.init) as tensors:
            for name in state.begin_from(trainer.engine, tensors):
                trainer.print(f"{name} is not in {tensors.path} and begins with random values")


def check_begins(source: BatchSource, train: TrainSection, rewinds: Rewinds) -> None:
    """Raises ConfigError if a run that is new cannot train on its data."""
    if source.after:
        raise ConfigError(
            f"data.plan = {source.location!r} continues another plan after its first {source.first_sample:,} samples, "
            "but this run is new: train on that plan first, or name a checkpoint of such a run with --resume"
        )
    check_samples(source, train, 0, 0, passed=rewinds.passed_over(0, train.global_batch_size, train.steps))


def begin_to_write(trainer: "Trainer", saved: Path | None) -> None:
    """Claims mirror and nodes' disks for a run that goes on from `saved`, once nothing refuses it. Collective.

    Raises DamagedTrainingData as `check_first`, ConfigError and CheckpointError as `claim_mirror`.
    """
    check_first(trainer.source.files(), trainer.mesh, trainer.agreement.consequence(trainer.step))
    if trainer.run.local:
        trainer.run.local.find_sharing()
    if mirror := trainer.config.checkpoint.mirror:
        claim_mirror(trainer.mesh, trainer.run.path, mirror)
    if trainer.run.local:
        trainer.run.local.begin(trainer.step)
    if saved is None:
        trainer.rewinds.forget()


def take_up(trainer: "Trainer", path: Path, manifest: dict[str, Any]) -> None:
    """Takes up the counts and the history of the checkpoint that training goes on from."""
    trainer.step, trainer.samples, trainer.tokens = manifest["step"], manifest["samples"], manifest["tokens"]
    trainer.tokens_by_source |= manifest.get("ledger", {})
    trainer.spikes.restore(manifest.get("spikes", {}))
    trainer.run.take_data_spans(manifest)
    check_left(trainer.source, trainer.config.train, trainer.rewinds, manifest, path)
    if trainer.step < trainer.config.train.steps:
        trainer.source.go_on(path, manifest)


def _check_identity(trainer: "Trainer", path: Path | str, manifest: dict[str, Any]) -> None:
    resume.check_identity(path, manifest, trainer.identity, trainer.source, trainer.run.full_config, trainer.lineage)


def check_left(
    source: BatchSource, train: TrainSection, rewinds: Rewinds, manifest: dict[str, Any], path: Path | None
) -> None:
    """Raises ConfigError if the data have too few samples for the steps after a checkpoint, the one at `path`."""
    step, samples = manifest["step"], manifest["samples"]
    passed = rewinds.passed_over(samples, train.global_batch_size, train.steps - step)
    check_samples(source, train, step, samples, path, passed)
