"""Sampling without training: rollouts from a run's current weights, recorded for `rl.replay` to train on.

Sampling and training so take turns in processes of their own, on other machines if need be: the first samples the next
rollout and ends, the second trains on it up to its last step and ends. Together they have the numbers of one run that
does both.
"""

from pathlib import Path

from configs.loader import ConfigError
from posttrain.rl.rollout_source import RolloutSource
from pretrain.run.taking_up import load_weights
from pretrain.trainer import Trainer


def record_rollouts(trainer: Trainer, source: RolloutSource, count: int) -> int:
    """Samples the next `count` rollouts of a run, or those that it has left, into rl.record; returns the exit status.

    Raises ConfigError if the run is finished. Collective.
    """
    steps, folder = trainer.config.train.steps, Path(str(source.settings.record))
    load_weights(trainer)
    done = trainer.step
    if done >= steps:
        raise ConfigError(f"the run is finished at step {done}, so it has no rollout left; raise train.steps = {steps}")
    first, last = -(-done // source.phases.steps), source.phases.rollout_of(steps - 1)
    for number in range(first, min(first + count, last + 1)):
        metrics = source.record_only(trainer.engine, number, folder).metrics()
        reward, scored = metrics["reward"]
        if trainer.mesh.is_main:
            print(
                f"{trainer.title}: rollout {number} of the weights of step {done}, mean reward "
                f"{reward / max(1, scored):.4g}, in {folder}",
                flush=True,
            )
    return 0
