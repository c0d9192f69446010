"""Run in a rank: counts how often a step asks the device for a value, which on a GPU waits for all work before it."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from pretrain.batch_source import micro_batches
from pretrain.model import attention
from pretrain.model.losses import NextToken
from pretrain.parallel import groups
from tests.parallel.workers.layouts import MICRO_BATCH, make_engine, rows

OURS = str(Path(__file__).parents[3] / "pretrain")
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "bincount")


def reads(model: dict[str, Any], num_batches: int, train: bool) -> dict[str, int]:
    """Returns the reads by code of pretrain in a training or evaluation step, by file and name."""
    engine = make_engine(model, {})
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

    batches = micro_batches(rows(0, num_batches * MICRO_BATCH, engine.model_config.vocab_size), MICRO_BATCH, 0)
    with ExitStack() as stack:
        for name in READS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, counted(name)))
        if train:
            engine.train_step(batches, NextToken(), lr=1e-3)
        else:
            engine.evaluate(batches, NextToken())
    groups.stop()
    return found


def rotary_tables(model: dict[str, Any], parallel: dict[str, Any], num_batches: int) -> int:
    """Returns how often this rank computes rotary tables in a training step."""
    engine = make_engine(model, parallel)
    batches = micro_batches(rows(0, num_batches * MICRO_BATCH, engine.model_config.vocab_size), MICRO_BATCH, 0)
    with mock.patch.object(attention, "rotary_angles", wraps=attention.rotary_angles) as computed:
        engine.train_step(batches, NextToken(), lr=1e-3)
    assert not engine._contexts  # all are left to autograd, which frees them
    groups.stop()
    return computed.call_count
