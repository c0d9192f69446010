"""Functions run in the ranks: training in which some samples have an infinite loss, or a very large one."""

import contextlib
import io
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pretrain.health.rewind_history import Rewinds
from pretrain.model.batch import Batch
from pretrain.model.losses import NextToken
from pretrain.parallel.engine import Engine
from tests.parallel.workers.training import Rows, make_trainer


class BadSamples(NextToken):
    """Next-token loss that is infinite on the samples `bad`, or `factor` times as large."""

    def __init__(self, bad: Sequence[int], factor: float = float("inf")):
        super().__init__()
        self.bad, self.factor = set(bad), factor

    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss_BS, metrics = super().__call__(logprobs_BS, batch)
        factor = torch.tensor([self.factor if i in self.bad else 1.0 for i in batch.samples or ()])
        return loss_BS * factor[:, None], metrics


def train_with_bad_samples(
    run_dir: str,
    model: dict[str, Any],
    steps: int,
    bad: Sequence[int],
    parallel: dict[str, Any] | None = None,
    fail_after_rewind: int | None = None,
    factor: float = float("inf"),
    **options: Any,
) -> dict[str, Any]:
    """Trains; returns the status or the error, what was printed, and the samples that this rank asked for.

    With `fail_after_rewind` the run fails before that step, counted from 0, once it has gone back.
    """
    said, went_back = io.StringIO(), []
    right = Rewinds.add

    def add(self: Rewinds, *args: Any) -> None:
        right(self, *args)
        went_back.append(1)

    def fail(_: Engine) -> None:
        if went_back:
            raise RuntimeError("the node went away")

    at: dict[int, Callable[[Engine], None]] = {fail_after_rewind: fail} if fail_after_rewind is not None else {}
    trainer = make_trainer(run_dir, model, parallel or {}, steps, at, **options)
    trainer.loss_fn = BadSamples(bad, factor)
    setattr(Rewinds, "add", add)  # noqa: B010
    answer: dict[str, Any] = {}
    try:
        with contextlib.redirect_stdout(said):
            answer["status"] = trainer.fit()
    except (RuntimeError, FloatingPointError) as error:
        answer["error"] = str(error)
    finally:
        setattr(Rewinds, "add", right)  # noqa: B010
    assert isinstance(trainer.source, Rows)
    return {**answer, "said": said.getvalue(), "asked": [i for part in trainer.source.asked for i in part]}


def train_with_a_fault(
    run_dir: str,
    model: dict[str, Any],
    parallel: dict[str, Any] | None = None,
    weight: str = "",
    module: str = "",
    on_rank: int = 1,
    backward: bool = False,
    once: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Trains; from step 4 on, one element of a weight, or of a module's output or its gradient, is infinite on a rank.

    Of an output it is an element of the second row in the second micro-batch, of `once` that step's first pass alone.
    """
    spoilt: list[int] = []

    def spoil(engine: Engine) -> None:
        if engine.mesh.rank != on_rank:
            return
        if weight:
            dict(engine.module.named_global_parameters())[weight].data.flatten()[7] = float("inf")
        for chunk in engine.module.chunks:
            found = dict(chunk.named_modules()).get(module)
            if module and found is not None:
                found.register_forward_hook(lambda _, __, output: change(engine, output))

    def change(engine: Engine, output: torch.Tensor) -> torch.Tensor:
        if engine.micro_batches != 2 or (once and spoilt):
            return output
        spoilt.append(1)
        one = torch.zeros_like(output)
        one[5, 1, 3] = float("inf")
        if backward:
            output = output.clone()
            output.register_hook(lambda gradient: gradient + one)
            return output
        return output + one

    trainer = make_trainer(run_dir, model, parallel or {}, 9, {3: spoil}, **options)
    try:
        return {"status": trainer.fit()}
    except FloatingPointError as error:
        return {"error": str(error)}


def train_with_a_flipped_bit(
    run_dir: str,
    model: dict[str, Any],
    parallel: dict[str, Any],
    weight: str = "",
    module: str = "",
    backward: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Trains with checks every second step; before step 4 the lowest bit of one number flips on rank 1.

    It is of a weight, or of a module's output, or its gradient, in the second of the step's forward passes.
    """
    passes: list[int] = []

    def flip(engine: Engine) -> None:
        if engine.mesh.rank != 1:
            return
        if weight:
            _flip(dict(engine.module.named_global_parameters())[weight].data)
        for chunk in engine.module.chunks:
            found = dict(chunk.named_modules()).get(module)
            if module and found is not None:
                found.register_forward_hook(lambda _, __, output: changed(output))

    def changed(output: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        output = output.clone()
        if len(passes) == 2 and backward:
            output.register_hook(lambda gradient: _flip(gradient.clone()))
        elif len(passes) == 2:
            _flip(output.detach())
        return output

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = make_trainer(run_dir, model, parallel, 9, {3: flip}, checks={"every": 2}, **options).fit()
    return {"status": status, "said": said.getvalue(), "host": platform.node()}


def _flip(tensor: torch.Tensor) -> torch.Tensor:
    """Flips the lowest bit of a tensor's 20th element, in place."""
    bits = tensor.view(torch.int32).view(-1)
    bits[19] ^= 1
    return tensor


def train_with_a_slow_rank(run_dir: str, model: dict[str, Any], parallel: dict[str, Any], slow: str) -> dict[str, Any]:
    """Trains 20 steps, in each of which rank 1 sleeps, before its rows or in the first layer of a micro-batch."""
    steps, said = 20, io.StringIO()

    def sleep(engine: Engine) -> None:
        if engine.mesh.rank == 1:
            time.sleep(0.3)

    def in_layer(*_: Any) -> None:
        if trainer.engine.micro_batches == 1:
            sleep(trainer.engine)

    at = dict.fromkeys(range(steps), sleep) if slow == "rows" else {}
    sections = {"eval": {"every": steps}, "watchdog": {"straggler": 1.2}}
    trainer = make_trainer(run_dir, model, parallel, steps, at, every=steps, **sections)
    if slow == "layer":
        trainer.engine.module.blocks[0].register_forward_pre_hook(in_layer)
    with contextlib.redirect_stdout(said):
        status = trainer.fit()
    return {"status": status, "said": said.getvalue(), "host": platform.node()}
