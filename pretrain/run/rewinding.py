"""Takes a run back to its last good checkpoint, in the same processes."""

from typing import TYPE_CHECKING

from pretrain.checkpoint import resume, state, storage
from pretrain.checkpoint.saving import Saver
from pretrain.health.rewind_history import BadStep
from pretrain.logs.activities import REWINDING
from pretrain.run.step_log import StepLog, spike
from pretrain.run.taking_up import take_up

if TYPE_CHECKING:
    from pretrain.trainer import Trainer


def go_back(trainer: "Trainer", bad: BadStep, steps: StepLog, saver: Saver) -> None:
    """Goes back to the newest whole checkpoint before a bad step, whose samples are passed over from now on.

    From there on the run computes what one does that is started from this checkpoint and passes over the same samples.
    Collective. Raises FloatingPointError if that has happened too often, or there is no such checkpoint.
    """
    said, run_dir = f"step {bad.step}: {spike(bad.record)}", trainer.run.path
    if not bad.is_finite:
        said += trainer.first_not_finite(bad.batches)
    trainer.activities.begin(REWINDING, trainer.step)
    saver.wait()
    if why := trainer.rewinds.refusal(bad):
        raise FloatingPointError(f"{said}; {why}")
    path = resume.choose(trainer.mesh, run_dir, "auto", before=bad.step, local=trainer.run.local)
    if path is None:
        raise FloatingPointError(
            f"{said}; {run_dir} has no checkpoint of a step before it to go back to; free disk space if it is full, "
            "or lower optimizer.lr"
        )
    manifest, reached = storage.read_manifest(path), trainer.step
    if trainer.run.local:
        trainer.run.local.begin(manifest["step"])
    state.restore(trainer.engine, path)
    trainer.engine.go_on_from_restored()
    trainer.rewinds.add(bad, manifest["step"])
    take_up(trainer, path, manifest)
    trainer.run.write_history()
    trainer.start_recorder.rewind(reached - trainer.step)
    trainer.agreement.go_back(trainer.step)
    steps.go_back(trainer.step)
    trainer.rows.go_back(trainer.samples, trainer.config.train.steps - trainer.step)
    first, end = bad.samples
    steps.say(f"{said}; going back to {path}, and passing over the step's samples, {first:,} to {end - 1:,}")
