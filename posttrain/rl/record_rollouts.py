"""Sampling without training: rollouts from a run's current weights, recorded for `rl.replay` to train on.

Sampling and training so take turns in processes of their own, on other machines if need be: the first samples the next
rollout and ends, the second trains on it up to its last step and ends. Together they have the numbers of one run that
does both. With `rl.staleness` both run at the same time, and each waits for files of the other: the first for the
checkpoint whose weights the next rollout is sampled with, the second for that rollout. Which weights these are depends
on the rollout's number alone, so the numbers do not depend on which of the two is faster, or on a restart of one.
"""

import time
from pathlib import Path

from configs.loader import ConfigError
from posttrain.rl import rollout_file
from posttrain.rl.rollout import Rollout
from posttrain.rl.rollout_source import RolloutSource
from pretrain.run.agreement import POLL_SECONDS, SAYS_SECONDS
from pretrain.run.taking_up import load_weights, load_weights_after
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
        _say(trainer, number, done, source.record_only(trainer.engine, number, folder), folder)
    return 0


def record_ahead(trainer: Trainer, source: RolloutSource, count: int) -> int:
    """Samples up to `count` rollouts of a run that another command trains; returns the exit status.

    It begins after those that rl.record has. Each is sampled with the weights that `rl.staleness` names, for which it
    waits. Raises ConfigError and CheckpointError as `load_weights_after`. Collective.
    """
    folder, phases = Path(str(source.settings.record)), source.phases
    recorded: list[int] = trainer.mesh.gather_json(rollout_file.numbers(folder))[0]
    first, last = (recorded[-1] + 1 if recorded else 0), phases.rollout_of(trainer.config.train.steps - 1)
    if first > last:
        raise ConfigError(
            f"{folder} has all rollouts, 0 to {last}, of train.steps = {trainer.config.train.steps}; raise it for more"
        )
    if recorded:
        source.go_on_after(folder, recorded[-1])
    loaded: int | None = None
    for number in range(first, min(first + count, last + 1)):
        step = phases.sampled_with(number, source.staleness)
        if step != loaded:
            _load(trainer, step)
        loaded = step
        _say(trainer, number, step, source.record_only(trainer.engine, number, folder, step), folder)
    return 0


def _load(trainer: Trainer, step: int) -> None:
    """Waits for the weights of a step, and loads them."""
    said = time.monotonic()
    while not load_weights_after(trainer, step):
        if time.monotonic() - said > SAYS_SECONDS:
            said = time.monotonic()
            trainer.print(f"waiting for step {step} of {trainer.run.path}, which the command that trains has to reach")
        time.sleep(POLL_SECONDS)


def _say(trainer: Trainer, number: int, step: int, rollout: Rollout, folder: Path) -> None:
    reward, scored = rollout.metrics()["reward"]
    mean = reward / max(1, scored)
    trainer.print(f"rollout {number} of the weights of step {step}, mean reward {mean:.4g}, in {folder}")
