"""The start of a run without its ranks, for --dry-run: refuses what the trainer would refuse before its first step.

Nothing is written, fetched or gathered, and files of checkpoints are read for their checksums alone. A mirror is read
as far as its newest manifest. What other nodes have on their disks, whether another process trains in the folder, and
what only weights can show, such as a sampler that differs from the trainer, is left out.
"""

from pathlib import Path
from typing import Any

from configs.loader import plain
from configs.model import ModelConfig
from configs.train import TrainerConfig
from pretrain.checkpoint import resume, storage
from pretrain.checkpoint.fetching import newer_manifest
from pretrain.checkpoint.lineage import Lineage
from pretrain.data.batch_source import BatchSource, check_source
from pretrain.evaluation.task_scores import task_scores
from pretrain.evaluation.text_samples import text_samples
from pretrain.health.rewind_history import Rewinds
from pretrain.parallel.frozen import check_patterns, names_of_weights
from pretrain.run.taking_up import check_begins, check_left
from pretrain.tracking.trackers import check_installed


class OneProcess:
    """The part of a mesh that checks need, in a process without other ranks."""

    is_main = True

    def gather_json(self, value: Any) -> list[Any]:
        return [value]


def check_dry_start(
    config: TrainerConfig, model: ModelConfig, source: BatchSource, lineage: Lineage, chosen: str, prints: bool
) -> None:
    """Checks the start of a run, and prints what it would go on from; `chosen` is the value of --resume.

    Raises ConfigError or CheckpointError as the run would.
    """
    said = _checked(config, model, source, lineage, chosen)
    if prints and said:
        print(said)


def _checked(
    config: TrainerConfig, model: ModelConfig, source: BatchSource, lineage: Lineage, chosen: str
) -> str | None:
    check_installed(config.tracking)
    task_scores(config, model, lineage)
    text_samples(config, model, lineage, lambda: 0)
    check_source(source, config.spikes)
    _check_weights(config, model, lineage)
    run_dir, train = Path(config.run.dir), config.train
    own = resume.choose_alone(run_dir, chosen)
    where, manifest = str(own), storage.read_manifest(own) if own else None
    found = None
    if mirror := config.checkpoint.mirror:
        found = newer_manifest(run_dir, mirror, own, chosen == "no")
    if found:
        where, manifest = found
    rewinds = Rewinds(config.spikes, run_dir, OneProcess(), source.fingerprint)
    rewinds.begin(manifest)
    if manifest is None:
        check_begins(source, train, rewinds)
        return None
    identity = resume.identity_of(config, model, source, lineage)
    resume.check_identity(where, manifest, identity, source, {**plain(config), "model": plain(model)}, lineage)
    check_left(source, train, rewinds, manifest, Path(where))
    if manifest["step"] >= train.steps:
        return f"{run_dir} is finished at step {manifest['step']}: nothing would be done"
    if own is not None and not found:
        source.go_on(own, manifest)
    return f"the run would go on from {where}"


def _check_weights(config: TrainerConfig, model: ModelConfig, lineage: Lineage) -> None:
    """Raises ConfigError if the model cannot have the adapters, or has no weights that train.freeze names."""
    adapter = config.adapter
    if adapter:
        adapter.check_init(lineage.init is not None)
        adapter.check_model(model, config.train.seq_length)
    if adapter or config.train.freeze:
        check_patterns(dict.fromkeys(names_of_weights(model, adapter)), config.train.freeze)
