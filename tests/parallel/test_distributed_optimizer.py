"""ZeRO stage 1 sends each gradient and each weight once, begins while backward runs, and agrees on the norm to the bit.

That it computes what one rank computes is held by test_layouts.py.
"""

from typing import Any

import pytest

from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "parallel"), [("dense_tied", {}), ("dense", {"cp": 2}), ("moe", {"ep": 2})])
def test_a_step_sends_no_more_than_it_must(ranks: RanksOf, model: str, parallel: dict[str, Any], dtype: str) -> None:
    for result in ranks(2).run(
        "tests.parallel.workers.reductions:sent",
        process_group=False,
        model=MODELS[model],
        parallel=parallel,
        dtype=dtype,
    ):
        # One reduce-scatter and one all-gather of every bucket that other ranks hold too, whatever the micro-batches.
        assert result["micro_batches"] > 1
        assert sorted(result["reduce_scatter"]) == sorted(result["all_gather"]) == sorted(result["shared"])
        assert len(result["shared"]) > 2 and (len(result["alone"]) > 0) == (model == "moe")
        assert 0 <= sum(result["shared"] + result["alone"]) - result["parameters"] <= result["padding"]
        # No reduction begins before the last micro-batch's backward pass, and most begin before its last gradient.
        events, first_of_last = result["events"], result["gradients"] * (result["micro_batches"] - 1)
        reductions = [i for i, event in enumerate(events) if event == "reduce"]
        last_gradient = max(i for i, event in enumerate(events) if event == "gradient")
        assert min(reductions) > first_of_last
        assert sum(i < last_gradient for i in reductions) >= len(reductions) / 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model", "world", "parallel"),
    [("moe_tied", 4, {"tp": 2, "ep": 2}), ("deepseek", 4, {"tp": 2, "sp": True, "ep": 2}), ("moe", 2, {"ep": 2})],
)
def test_ranks_agree_to_the_bit(ranks: RanksOf, model: str, world: int, parallel: dict[str, Any], dtype: str) -> None:
    first, *others = ranks(world).run(
        "tests.parallel.workers.reductions:norms",
        process_group=False,
        model=MODELS[model],
        parallel=parallel,
        dtype=dtype,
        steps=3,
    )
    assert len(first["norms"]) == 3 and len(first["weights"]) > 5
    for other in others:
        assert other == first
