"""Training in which one rank stops making progress in the middle of a step, as ranks of tests/parallel/kills.py."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.heldout_loss import HeldoutLoss
from pretrain.parallel.engine import Engine
from tests.parallel.workers.training import make_trainer

SLEEPING = 3600.0  # seconds; the watchdog ends the rank long before
LONGER = 15.0  # seconds that the first evaluation may take, and no step


def hang(fault: str, at: int, victim: int, **options: Any) -> dict[str, Any]:
    """Trains; in the step after step `at`, rank `victim` has the fault in the forward pass of its first micro-batch."""
    right, measure = Engine._context, HeldoutLoss.__call__

    def slow(heldout: HeldoutLoss, engine: Engine) -> Any:
        found = measure(heldout, engine)
        if fault == "evaluates longer" and engine.mesh.rank == victim:
            _wait_for_a_verdict(Path(options["run_dir"]))
        return found

    def faulty(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        if trainer.step == at and engine.mesh.rank == victim and engine.micro_batches == 1:
            _fail(fault, engine)
        return right(engine, *args, **kwargs)

    setattr(HeldoutLoss, "__call__", slow)  # noqa: B010
    setattr(Engine, "_context", faulty)  # noqa: B010 - the rank's process ends after this run
    trainer = make_trainer(at={}, **options)
    return {"status": trainer.fit()}


def _wait_for_a_verdict(run_dir: Path) -> None:
    """Waits until a watchdog has decided whether the run hangs: sooner or later, by how long its steps took."""
    end = time.monotonic() + LONGER
    while time.monotonic() < end and not any(run_dir.glob("hang/*/verdict.json")):
        time.sleep(0.05)


def _fail(fault: str, engine: Engine) -> None:
    if fault == "sleeps":
        time.sleep(SLEEPING)
    elif fault == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "enters another":
        dist.all_gather([torch.zeros(7) for _ in range(dist.get_world_size())], torch.zeros(7))
