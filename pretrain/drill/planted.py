"""`python -m pretrain.drill.planted RANK FIRST COUNT CONFIG ...`: pretraining in which a rank computes a NaN.

It is `trivium train CONFIG ...` but for one thing: on rank RANK, in a step that has any of the COUNT samples from FIRST
on, one number of the first block's output is a NaN, in its first micro-batch, each time that it is computed.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from configs.cli import entrypoint
from launch.environment import is_main, report_to_torchrun
from pretrain import train
from pretrain.model.batch import Batch
from pretrain.model.losses import LossFunction
from pretrain.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Trains with the fault, and returns the exit status of training."""
    rank, first, count, *words = sys.argv[1:] if argv is None else argv
    right = train.make_trainer

    @functools.wraps(right)
    def make_trainer(*args: Any, **kwargs: Any) -> Trainer:
        trainer = right(*args, **kwargs)
        if trainer.mesh.rank == int(rank):
            plant(trainer, range(int(first), int(first) + int(count)))
        return trainer

    setattr(train, "make_trainer", make_trainer)  # noqa: B010
    return train.main(words)


def plant(trainer: Trainer, bad: range) -> None:
    """Makes a number of the first block's output a NaN in steps with any of the samples `bad`."""
    engine, is_bad = trainer.engine, False
    right: Callable[[Sequence[Batch], LossFunction], None] = engine.accumulate

    def accumulate(batches: Sequence[Batch], loss_fn: LossFunction) -> None:
        nonlocal is_bad
        is_bad = any(sample in bad for batch in batches for sample in batch.samples or ())
        right(batches, loss_fn)
        is_bad = False

    def spoil(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        if not is_bad or engine.micro_batches != 1:
            return output
        change = torch.zeros_like(output)
        change.view(-1)[0] = float("nan")
        return output + change

    setattr(engine, "accumulate", accumulate)  # noqa: B010
    next(iter(engine.module.blocks.values())).register_forward_hook(spoil)


if __name__ == "__main__":
    entrypoint(main, prints_errors=is_main(), on_error=report_to_torchrun)
