"""A step that is not finite names the first tensor that is not, with its rank, micro-batch and sample."""

from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint import storage
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS

WORKER = "tests.parallel.workers.bad_steps:train_with_a_fault"
full = pytest.mark.full


@pytest.mark.parametrize(
    ("model", "parallel", "coordinates"),
    [
        ("dense", {"tp": 2}, "rank 1 (tp 1)"),
        pytest.param("dense", {"pp": 2}, "rank 1 (pp 1)", marks=full),
        pytest.param("moe", {"ep": 2}, "rank 1 (dp 1, ep 1)", marks=full),
    ],
)
def test_an_infinite_weight_of_one_rank_is_named(
    ranks: RanksOf, tmp_path: Path, model: str, parallel: dict[str, int], coordinates: str
) -> None:
    name = "layers.1.moe.experts.down_proj" if model == "moe" else "layers.1.mlp.down_proj.weight"
    options: dict[str, Any] = {"run_dir": str(tmp_path), "model": MODELS[model], "parallel": parallel, "weight": name}
    answers = ranks(2).run(WORKER, process_group=False, **options)
    (error,) = {answer["error"] for answer in answers}
    assert error.startswith("step 4: the gradient norm is not finite; no weight was changed by this step; the first ")
    assert f"; the first tensor that is not finite is the weight {name} on {coordinates}: 1 of " in error
    assert error.endswith("; lower optimizer.lr and run the command again") and "the same on rank" not in error


@pytest.mark.parametrize(
    ("parallel", "rank", "coordinates", "micro_batches"),
    [
        ({}, 1, "rank 1 (dp 1)", 2),
        pytest.param({"tp": 2, "sp": True}, 1, "rank 1 (tp 1)", 4, marks=full),
        ({"pp": 2}, 0, "rank 0 (pp 0)", 4),
        pytest.param({"cp": 2}, 1, "rank 1 (cp 1)", 4, marks=full),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_an_infinite_activation_of_one_token_is_named(
    ranks: RanksOf,
    tmp_path: Path,
    parallel: dict[str, Any],
    rank: int,
    coordinates: str,
    micro_batches: int,
    backward: bool,
) -> None:
    """Makes an activation or its gradient infinite in the second micro-batch of step 4, in its second row."""
    options: dict[str, Any] = {
        "model": MODELS["dense"],
        "parallel": parallel,
        "module": "layers.0.mlp",
        "on_rank": rank,
    }
    answers = ranks(2).run(WORKER, process_group=False, run_dir=str(tmp_path), backward=backward, **options)
    (error,) = {answer["error"] for answer in answers}
    kind = "gradient of the output" if backward else "output"
    # Rank 1 of dp has the second half of the step's eight samples, 24 to 31, two in each micro-batch.
    sample = 24 + (4 if not parallel and rank == 1 else 0) + 3
    token = 5 + (12 if "cp" in parallel or "tp" in parallel else 0)
    assert f"the {kind} of layers.0.mlp on {coordinates}, micro-batch 2 of {micro_batches}: 1 of " in error, error
    assert f", token {token} of sample {sample}; " in error
    assert storage.steps(tmp_path) == [2]


def test_a_fault_that_does_not_come_again_is_said_to_be_one(ranks: RanksOf, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": MODELS["dense"], "module": "layers.0.mlp", "on_rank": 0, "once": True}
    (answer,) = ranks(1).run(WORKER, process_group=False, run_dir=str(tmp_path), **options)
    assert "computed again, all of the step's tensors are finite" in answer["error"]
    assert answer["error"].endswith("look at the machines, and run the command again")


def test_finite_gradients_without_a_finite_norm_are_said_to_be_large(ranks: RanksOf, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": MODELS["dense"], "steps": 4, "bad": list(range(24, 32)), "factor": 1e30}
    worker = "tests.parallel.workers.bad_steps:train_with_bad_samples"
    (answer,) = ranks(1).run(worker, process_group=False, run_dir=str(tmp_path), **options)
    assert "computed again, all of the step's tensors are finite, but the norm of gradients of up to" in answer["error"]
    assert "e+2" in answer["error"], "the largest gradient"
    end = (
        " is not: a factor of the loss is too large, or the run diverges; lower optimizer.lr and run the command again"
    )
    assert answer["error"].endswith(end)
