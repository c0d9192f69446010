"""History of a run: which changes of settings and data are reported, and how."""

from pathlib import Path
from typing import Any

from configs.loader import load, plain
from configs.train import PretrainConfig
from pretrain.run import history

PRESET = Path(__file__).resolve().parents[4] / "configs/pretrain/demo.toml"


def config(*overrides: str) -> PretrainConfig:
    own = ["train.steps=40", "optimizer.lr=1e-3", "schedule.min_lr_ratio=0.1"]
    return load(PretrainConfig, PRESET, [*own, *overrides])


def data_span(step: int, *overrides: str, data: str = "a", **facts: Any) -> history.DataSpan:
    settings = plain(config(*overrides))
    return {
        "first_step": step,
        "first_sample": step * 16,
        "global_batch_size": 16,
        "data": data,
        "plan": "runs/data/plan",
        "facts": facts,
        "config": settings,
    }


def news(step: int, before: list[str], after: list[str]) -> list[str]:
    return history.describe_changes(data_span(0, *before), config(*after), data_span(step, *after))


def test_settings_that_change_numbers_are_told() -> None:
    (line, rate) = news(40, ["train.steps=80"], ["train.steps=80", "optimizer.lr=1e-2"])
    assert line == "optimizer.lr 0.001 -> 0.01 from step 40 on"
    assert "the learning rate of step 40 is 0.006" in rate and "would have made it 0.0006" in rate
    elsewhere = ["log.every=7", "run.dir=x", "data.plan=y"]
    assert news(20, [], elsewhere) == []
    assert history.append_span([data_span(0)], data_span(20, *elsewhere)) == [data_span(0)]
    # These change no number of the training, so that a replay may go across their change.
    beside = ["checkpoint.every=9", "checkpoint.keep=5", "eval.every=3"]
    assert "eval.every 1600 -> 3 from step 20 on" in news(20, [], beside) and len(news(20, [], beside)) == 3
    (_, told) = history.describe_spans(history.append_span([data_span(0)], data_span(20, *beside)))
    assert "eval.every 1600 -> 3" in told
    assert not history.changed(data_span(0)["config"], data_span(20, *beside)["config"])
    changed = ["optimizer.betas=[0.9,0.9]", "train.precision=bf16", "train.recompute=full"]
    assert len(news(20, [], changed)) == 3


def test_a_schedule_that_begins_again_is_told() -> None:
    (steps, jump) = news(40, [], ["train.steps=80"])
    assert steps == "train.steps 40 -> 80 from step 40 on"
    assert "the schedule had ended at a learning rate of 0.0001, but step 40 has 0.0006" in jump
    assert "schedule.steps" in jump
    # With schedule.steps set from the start, as the message suggests, no jump is reported.
    whole = "schedule.steps=80"
    assert news(40, [whole], [whole, "train.steps=80"]) == [steps]


def test_other_data_are_told_by_their_settings() -> None:
    before = data_span(0, mixture={"samples": 24, "weights": {"code": 0.5}}, documents={"code": "1a"})
    after = data_span(20, data="b", mixture={"samples": 48, "weights": {"code": 0.9}}, documents={"code": "2b"})
    words = ["mixture.samples 24 -> 48", "mixture.weights.code 0.5 -> 0.9"]
    assert history.describe_changes(before, config(), after) == [f"{line} from step 20 on" for line in words]
    (first, second) = history.describe_spans([before, after])
    assert first == "from step 0, sample 0: 16 rows a step of runs/data/plan"
    assert second == "from step 20, sample 320: 16 rows a step of runs/data/plan; " + "; ".join(words)
    # A data span without a trained step is dropped, and one that equals the last is not appended.
    assert history.append_span([before, after], data_span(20, data="c")) == [before, data_span(20, data="c")]
    assert history.append_span([before], data_span(20)) == [before]


def test_a_config_of_before_a_key_was_there_is_completed() -> None:
    old = plain(config())
    full = history.completed(PretrainConfig, old)
    assert full == old and not history.changed(old, full)
    for section, key in (
        ("optimizer", "weight_decay"),
        ("train", "dropout"),
        ("model", "attention"),
        ("schedule", "kind"),
    ):
        del old[section][key]
    del old["log"]
    assert history.completed(PretrainConfig, old) == full
    old["train"]["gone"] = 1
    assert history.completed(PretrainConfig, old) == old
