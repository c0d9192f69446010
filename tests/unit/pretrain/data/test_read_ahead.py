"""Micro-batches that a thread prepares ahead of the step that needs them."""

import threading
import time

import numpy as np
import pytest
import torch

from data_pipeline.mixture.rows import Row
from pretrain.data.batch_source import micro_batches
from pretrain.data.read_ahead import STEPS_AHEAD, ReadAhead
from pretrain.model.batch import Batch

CPU = torch.device("cpu")


def batches_of(step: int) -> list[Batch]:
    tokens = np.full(4, step)
    return micro_batches([Row(tokens, tokens, tokens == step, np.arange(4), np.zeros(4, int), 0)], 1, step)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "read ahead"]


def test_steps_come_in_order_and_only_so_many_are_prepared_before() -> None:
    prepared: list[int] = []

    def prepare(step: int) -> list[Batch]:
        prepared.append(step)
        return batches_of(step)

    with ReadAhead(prepare, range(3, 20), CPU) as ahead:
        for step in range(3, 12):
            (batch,) = ahead.next()
            assert batch.tokens.unique().tolist() == [step] and batch.samples == (step,)
            deadline = time.monotonic() + 10
            while len(prepared) < step - 3 + 2 + STEPS_AHEAD and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)  # time for the thread to go too far
            assert prepared == list(range(3, step + 2 + STEPS_AHEAD))  # one more waits for room
        assert threads()
    assert not threads()  # although steps are left


def test_an_error_comes_when_its_step_comes() -> None:
    def prepare(step: int) -> list[Batch]:
        if step == 2:
            raise ValueError("row 2 is damaged")
        return batches_of(step)

    with ReadAhead(prepare, range(9), CPU) as ahead:
        assert [ahead.next()[0].samples for _ in range(2)] == [(0,), (1,)]
        with pytest.raises(ValueError, match="row 2 is damaged"):
            ahead.next()
    assert not threads()


def test_a_run_that_ends_early_does_not_wait_for_the_steps_that_are_left() -> None:
    with pytest.raises(RuntimeError, match="the node went away"), ReadAhead(batches_of, range(10**9), CPU):
        raise RuntimeError("the node went away")
    assert not threads()
