"""Learning-rate schedules at the steps that matter, against numbers worked out by hand."""

import pytest

from configs.train import ScheduleConfig
from pretrain.schedule import learning_rate


def rates(schedule: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate(step, steps, 1.0, schedule) for step in range(steps)]


def test_cosine_warms_up_linearly_and_ends_at_the_floor() -> None:
    found = rates(ScheduleConfig(kind="cosine", warmup_steps=4, min_lr_ratio=0.1), 12)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[7] == pytest.approx(0.55)  # half way: (1 + 0.1) / 2
    assert found[-1] == pytest.approx(0.1)
    assert found[4:] == sorted(found[4:], reverse=True)


def test_wsd_is_flat_then_linear_to_the_floor() -> None:
    found = rates(ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=4, min_lr_ratio=0.0), 10)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0])


def test_constant_stays() -> None:
    assert rates(ScheduleConfig(kind="constant"), 3) == [1.0, 1.0, 1.0]
