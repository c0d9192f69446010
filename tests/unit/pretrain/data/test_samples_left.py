"""Samples that a run needs and its data lack: what the message says to set can be set."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from configs.loader import ConfigError
from configs.train import TrainSection
from pretrain.data.batch_source import check_samples


def said(steps: int, step: int, passed: int) -> str:
    source: Any = SimpleNamespace(num_samples=40, first_sample=0, following=None, location="plan")
    train = TrainSection(steps=steps, global_batch_size=4, micro_batch_size=4, seq_length=8)
    try:
        check_samples(source, train, step, 4 * step, passed=passed)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("step", "passed", "most"), [(0, 0, "10"), (0, 8, "8"), (4, 8, "8"), (0, 99, ""), (4, 99, "")])
def test_steps_are_named_only_if_there_are_some(step: int, passed: int, most: str) -> None:
    message = said(20, step, passed)
    assert "raise mixture.samples in the data config" in message
    assert re.findall(r"set train\.steps=(\S+), or ", message) == ([most] if most else [])
    assert not most or not said(int(most), step, passed)
