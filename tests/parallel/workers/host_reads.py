"""Run in a rank: counts how often a step asks the device for a value, which on a GPU waits for all work before it."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pretrain.data.batch_source import micro_batches
from pretrain.model import context
from pretrain.model.losses import NextToken
from pretrain.parallel import groups
from pretrain.parallel.step_sums import HostCopy
from tests.parallel.workers.layouts import MICRO_BATCH, make_engine, rows
from tests.parallel.workers.training import make_trainer

OURS = str(Path(__file__).parents[3] / "pretrain")
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "bincount")


@contextlib.contextmanager
def counted_reads() -> Iterator[dict[str, int]]:
    """Counts reads by code of pretrain inside the context, by file, function and name."""
    found: dict[str, int] = {}

    def counted(name: str) -> Any:
        right = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            caller = sys._getframe(1)
            if caller.f_code.co_filename.startswith(OURS):
                key = f"{Path(caller.f_code.co_filename).name} {caller.f_code.co_name}: {name}"
                found[key] = found.get(key, 0) + 1
            return right(tensor, *args, **options)

        return read

    with contextlib.ExitStack() as stack:
        for name in READS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, counted(name)))
        yield found


def reads(model: dict[str, Any], num_batches: int, train: bool) -> dict[str, int]:
    """Returns the reads in a training or evaluation step whose results nobody has asked for yet."""
    engine = make_engine(model, {})
    batches = micro_batches(rows(0, num_batches * MICRO_BATCH, engine.model_config.vocab_size), MICRO_BATCH, 0)
    with counted_reads() as found:
        if train:
            engine.train_step(batches, NextToken(), lr=1e-3)
        else:
            engine.evaluate(batches, NextToken())
    groups.stop()
    return found


def loop(run_dir: str, model: dict[str, Any], parallel: dict[str, Any], steps: int) -> dict[str, Any]:
    """Trains in a run of its own; returns the reads of steps, and in order when steps begin and results are fetched."""
    events: list[str] = []
    trainer = make_trainer(run_dir, model, parallel, steps, {}, every=100, eval={"every": 100}, log={"detail_every": 1})
    step, fetch, loop = trainer.engine.train_step, HostCopy.tensors, trainer._loop

    def noted(event: str, right: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            events.append(event)
            return right(*args, **options)

        return call

    def counted_loop(*args: Any) -> int:
        with counted_reads() as found:
            status = loop(*args)
        reads.update(found)
        return status

    reads: dict[str, int] = {}
    with (
        mock.patch.object(trainer.engine, "train_step", noted("step", step)),
        mock.patch.object(HostCopy, "tensors", noted("fetch", fetch)),
        mock.patch.object(trainer, "_loop", counted_loop),
    ):
        assert trainer.fit() == 0
    groups.stop()
    return {"reads": reads, "events": events}


def rotary_tables(model: dict[str, Any], parallel: dict[str, Any], num_batches: int) -> int:
    """Returns how often this rank computes rotary tables in a training step."""
    engine = make_engine(model, parallel)
    batches = micro_batches(rows(0, num_batches * MICRO_BATCH, engine.model_config.vocab_size), MICRO_BATCH, 0)
    with mock.patch.object(context, "rotary_angles", wraps=context.rotary_angles) as computed:
        engine.train_step(batches, NextToken(), lr=1e-3)
    assert not engine._contexts  # all are left to autograd, which frees them
    groups.stop()
    return computed.call_count
