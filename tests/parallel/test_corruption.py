"""A bit that flips on one rank is found and the rank named, and the checks change no number of a run."""

from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError, validate
from configs.signals import CORRUPTED
from configs.train import TrainerConfig
from pretrain.checkpoint import storage
from pretrain.health.corruption import outvoted
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS
from tests.parallel.runs import assert_same_state, metrics, train

WORKER = "tests.parallel.workers.bad_steps:train_with_a_flipped_bit"
full = pytest.mark.full


@pytest.mark.parametrize(
    ("world", "parallel", "weight", "said"),
    [
        (
            2,
            {},
            "layers.1.mlp.down_proj.weight",
            "rank 0 (dp 0) on {} and rank 1 (dp 1) on {} have different bits",
        ),
        pytest.param(
            2, {"tp": 2}, "layers.1.mlp_norm.weight", "and rank 1 (tp 1) on {} have different bits", marks=full
        ),
        pytest.param(4, {}, "embedding.weight", "rank 1 (dp 1) on {} has other bits", marks=full),
    ],
)
def test_a_flipped_bit_of_a_weight_is_found(
    ranks: RanksOf, tmp_path: Path, world: int, parallel: dict[str, int], weight: str, said: str
) -> None:
    """Flips a bit before step 4, whose update is not made: the checkpoint of step 2 is the last."""
    options: dict[str, Any] = {"model": MODELS["dense"], "parallel": parallel, "weight": weight}
    if world == 4:
        options["train"] = {"micro_batch_size": 1}
    answers = ranks(world).run(WORKER, process_group=False, run_dir=str(tmp_path), **options)
    assert [answer["status"] for answer in answers] == [CORRUPTED] * world
    text = answers[0]["said"]
    assert "error: silent corruption before the update of step 4: " in text
    assert said.replace("{}", answers[0]["host"]) + f" of {weight} from " in text
    outvoted = "than the 3 other ranks that hold the same" in text
    assert outvoted or "one of them is at fault, and none is outvoted" in text
    assert "go on from a checkpoint of step 1 or before" in text  # the check of step 2, before its update
    assert storage.steps(tmp_path) == [2]


@pytest.mark.parametrize(
    ("parallel", "mesh", "backward"),
    [
        ({"tp": 2}, "rank 1 (tp 1)", False),
        pytest.param({}, "rank 1 (dp 1)", True, marks=full),
        pytest.param({"pp": 2}, "rank 1 (pp 1)", True, marks=full),
    ],
)
def test_a_wrong_result_of_a_computation_is_found(
    ranks: RanksOf, tmp_path: Path, parallel: dict[str, int], mesh: str, backward: bool
) -> None:
    """Flips once, on rank 1, the lowest bit of one element of a module's output or its gradient."""
    options: dict[str, Any] = {"model": MODELS["dense"], "parallel": parallel, "module": "layers.1.mlp"}
    answers = ranks(2).run(WORKER, process_group=False, run_dir=str(tmp_path), backward=backward, **options)
    assert [answer["status"] for answer in answers] == [CORRUPTED] * 2
    what = "gradient of the output" if backward else "output"
    expected = (
        f"had other bits the second time, first the {what} of layers.1.mlp on {mesh} on {answers[0]['host']}; its"
    )
    assert expected in answers[0]["said"]


@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ("moe_tied", {}),
        pytest.param("moe_tied", {"pp": 2, "vpp": 2}, marks=full),
        pytest.param("deepseek", {"tp": 2, "sp": True}, marks=full),
        pytest.param("moe", {"ep": 2}, marks=full),
        pytest.param("dense", {"cp": 2}, marks=full),
    ],
)
def test_checks_change_no_number(ranks: RanksOf, tmp_path: Path, model: str, parallel: dict[str, int]) -> None:
    plain, checked = tmp_path / "plain", tmp_path / "checked"
    assert train(ranks(2), plain, model, parallel, steps=4) == [{"status": 0}] * 2
    assert train(ranks(2), checked, model, parallel, steps=4, checks={"every": 1}) == [{"status": 0}] * 2
    assert metrics(checked) == metrics(plain)
    assert_same_state(storage.directory(plain, 4), storage.directory(checked, 4))


def test_a_majority_outvotes_the_rest() -> None:
    assert outvoted({0: 5, 1: 7, 2: 5}) == (1,)
    assert outvoted({3: 5, 4: 7}) == (3, 4)
    assert outvoted({0: 5, 1: 7, 2: 5, 3: 7}) == (0, 1, 2, 3)
    assert outvoted({0: 5, 1: 6, 2: 7, 3: 7, 4: 7}) == (0, 1)


def test_checks_are_refused_where_gradients_cannot_be_seen() -> None:
    tree: dict[str, Any] = {
        "run": {"dir": "run"},
        "train": {"steps": 8, "global_batch_size": 2, "micro_batch_size": 1, "seq_length": 8},
        "optimizer": {"lr": 1e-3},
        "checks": {"every": 100},
    }
    with pytest.raises(ConfigError, match=r"parallel\.zero = 2 do not show; set checks\.every=0"):
        validate(TrainerConfig, tree | {"parallel": {"zero": 2}})
    validate(TrainerConfig, tree)
