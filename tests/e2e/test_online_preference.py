"""`trivium dpo` with pairs that the model writes itself: the same at any layout, and after an interruption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.loader import ConfigError, toml, validate
from configs.preference import PreferenceConfig
from posttrain.preference.online_source import pairs_of
from posttrain.rl.rollout import Rollout
from pretrain.checkpoint import storage
from tests.e2e.posttrain_configs import SORT, rl_config, write_base
from tests.parallel.harness import RankError, RanksOf
from tests.parallel.runs import metrics


def config(base: Path) -> dict[str, Any]:
    """Returns the config of three steps from the fine-tuned model."""
    own = {
        "task": SORT | {"eval_prompts": 32},
        "online": {"completions": 4},
        "preference": {"beta": 0.1},
        "checkpoint": {"every": 1, "keep": 9},
    }
    return rl_config(base, "dpo", 3, (16, 8), 48, **own)


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs online DPO into a folder on so many ranks, from a model that sorts a little, and returns the folder."""
    base = write_base(ranks, tmp_path_factory.mktemp("online"))
    (base / "dpo.toml").write_bytes(toml(config(base)))
    argv = [str(base / "sft.toml"), "train.steps=60", "task.eval_prompts=1"]
    assert set(ranks(2).run("posttrain.sft:main", process_group=False, timeout=300, argv=argv)) == {0}

    def run(world: int, folder: Path, *options: str) -> Path:
        argv = [str(base / "dpo.toml"), f"run.dir={folder}", *options]
        assert set(ranks(world).run("posttrain.dpo:main", process_group=False, timeout=300, argv=argv)) == {0}
        return folder

    return run


@pytest.fixture(scope="module")
def one(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(1, tmp_path_factory.mktemp("one") / "run")


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(folder) if "loss" in line]


def test_the_model_learns_from_its_own_pairs(one: Path) -> None:
    steps = steps_of(one)
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # policy and reference are the same
    assert steps[0]["rewards/margin"] == pytest.approx(0, abs=1e-4) and steps[-1]["rewards/margin"] != 0
    assert steps[0]["pairs"] == 16 and steps[0]["drawn_prompts"] >= 16
    assert set(metrics(one)[-1]["eval"]) == {"sort answers"}


@pytest.mark.parametrize("layout", ["parallel.tp=1", pytest.param("parallel.tp=2", marks=pytest.mark.full)])
def test_two_ranks_make_and_learn_the_same_pairs(run: Run, one: Path, tmp_path: Path, layout: str) -> None:
    for line, other in zip(steps_of(run(2, tmp_path, layout)), steps_of(one), strict=True):
        assert [line[name] for name in ("reward", "pairs", "drawn_prompts", "completion_tokens")] == [
            other[name] for name in ("reward", "pairs", "drawn_prompts", "completion_tokens")
        ]
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_a_stopped_run_goes_on_bit_identically(run: Run, one: Path, tmp_path: Path) -> None:
    run(1, tmp_path, "train.steps=1")
    run(1, tmp_path)
    assert steps_of(tmp_path) == steps_of(one)
    weights = [storage.read_full(storage.latest(folder)) for folder in (tmp_path, one)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_pairs_are_made_once_completions_differ_as_the_message_says(run: Run, tmp_path: Path) -> None:
    """Samples nearly without randomness, so that all completions of a prompt are the same."""
    alike, own = ["online.temperature=0.001", "online.max_draws=1"], ["train.steps=1", "eval.every=1000"]
    words = r"none of 16 prompts of step 1 has completions of different scores, so there is no pair to learn from; "
    with pytest.raises(RankError, match=words + r"choose an easier task, or raise .*, online\.temperature or online"):
        run(1, tmp_path / "run", *own, *alike)
    run(1, tmp_path / "run", *own, "online.temperature=1.0", "online.max_draws=1")


@pytest.mark.full
def test_answers_become_right_more_often(run: Run, tmp_path: Path) -> None:
    options = ["train.steps=40", "eval.at_start=true", "task.eval_prompts=256", "optimizer.lr=5e-4", "eval.every=40"]
    evals = [line["eval"]["sort answers"]["sampled"] for line in metrics(run(1, tmp_path, *options)) if "eval" in line]
    assert evals[-1] > evals[0] + 0.05


def test_best_and_worst_are_paired_and_the_unscorable_left_out() -> None:
    scores = np.array([0.2, np.nan, 0.9, 0.2, 1, 1, 1, 1, np.nan, np.nan, np.nan, 0.5], np.float32)
    tokens = np.arange(12 * 5, dtype=np.int32).reshape(12, 5)
    mask = np.zeros((12, 5), bool)
    mask[:, 2:4] = True  # a prompt of 3 tokens, and 2 that were sampled
    arrays = {
        "tokens": tokens,
        "labels": np.where(mask, tokens + 1, 0),
        "mask": mask,
        "lengths": np.full(12, 4, np.int32),
        "prompts": np.repeat([7, 8, 9], 4),
        "scores": scores,
    }
    (pair,) = pairs_of(Rollout(arrays, 4))
    assert pair.id == "7"
    assert pair.chosen.tokens.tolist() == [10, 11, 12, 13, 14] and pair.rejected.tokens.tolist() == [0, 1, 2, 3, 4]
    assert pair.chosen.answer.tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"pairs": ["x"]}}, "both are set; set one of the two"),
        ({"online": None, "task": None}, "neither is set"),
        ({"task": None}, "belong together"),
        ({"preference": {"loss": "kto"}}, "choose another loss"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, Any], words: str) -> None:
    tree = config(Path("x")) | changes
    with pytest.raises(ConfigError, match=words):
        validate(PreferenceConfig, {name: section for name, section in tree.items() if section is not None})
