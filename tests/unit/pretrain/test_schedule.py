"""Learning-rate schedules at their first, middle and last steps, compared with numbers computed by hand."""

from pathlib import Path

import pytest

from configs.loader import ConfigError, load, validate
from configs.train import PretrainConfig, ScheduleConfig
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


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_a_run_in_parts_has_the_rates_of_one(kind: str) -> None:
    settings = {"kind": kind, "warmup_steps": 3, "decay_steps": 5}
    one = rates(validate(ScheduleConfig, settings), 20)
    parts = validate(ScheduleConfig, settings | {"steps": 20})
    found = [
        learning_rate(step, end, 1.0, parts) for begin, end in ((0, 9), (9, 16), (16, 20)) for step in range(begin, end)
    ]
    assert found == one
    assert (
        rates(validate(ScheduleConfig, settings | {"steps": 30}), 20)
        == rates(parts.model_copy(update={"steps": 30}), 30)[:20]
    )


def config(**schedule: object) -> PretrainConfig:
    preset = Path(__file__).resolve().parents[3] / "configs/pretrain/demo.toml"
    return load(
        PretrainConfig, preset, ["train.steps=50", *(f"schedule.{key}={value}" for key, value in schedule.items())]
    )


def test_the_schedule_ends_with_the_run_or_after_it() -> None:
    assert config(steps=50).schedule.steps == 50 and config(steps=500, warmup_steps=100).schedule.warmup_steps == 100
    with pytest.raises(ConfigError, match=r"schedule\.steps = 49 ends before train\.steps = 50.*leave it out, or set "):
        config(steps=49)
    with pytest.raises(
        ConfigError, match=r"decay_steps = 80 do not fit into schedule\.steps = 80; shorten them, or set schedule"
    ):
        config(kind="wsd", decay_steps=80, steps=80)
    assert config(kind="wsd", decay_steps=80, steps=90).schedule.decay_steps == 80


def test_constant_stays() -> None:
    assert rates(ScheduleConfig(kind="constant"), 3) == [1.0, 1.0, 1.0]
