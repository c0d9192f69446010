"""ZeRO stage 1 sends each gradient and each weight once, begins while backward runs, and agrees on the norm to the bit.

That it computes what one rank computes is held by test_layouts.py.
"""

from typing import Any

import pytest

from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS, parts_of


@pytest.mark.parametrize("world", [2, 3, 4])
def test_sums_are_those_in_order_of_ranks_to_the_bit(ranks: RanksOf, world: int) -> None:
    for dtype in "float32", "bfloat16", "float64":
        for result in ranks(world).run("tests.parallel.workers.reductions:sums", elements=4096, dtype=dtype, buckets=5):
            assert result == {"reduced": True, "gathered": True}, dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_left_of_the_gradients_of_the_step_before(ranks: RanksOf, dtype: str) -> None:
    for result in ranks(2).run(
        "tests.parallel.workers.reductions:taken", process_group=False, model=MODELS["dense"], dtype=dtype
    ):
        assert result == {"used": True, "others": True}


@pytest.mark.parametrize(
    ("model", "world", "parallel", "dtype"),
    [
        ("dense_tied", 2, {}, "float32"),
        ("dense_tied", 2, {}, "bfloat16"),
        ("dense", 2, {"cp": 2}, "float32"),
        ("moe", 2, {"ep": 2}, "bfloat16"),
        ("dense", 4, {}, "bfloat16"),
        ("moe", 4, {"ep": 2}, "float32"),
        ("dense_tied", 4, {"tp": 2, "sp": True}, "bfloat16"),
        ("dense", 4, {"pp": 2, "vpp": 2}, "float32"),
    ],
)
def test_a_step_sends_no_more_than_it_must(
    ranks: RanksOf, model: str, world: int, parallel: dict[str, Any], dtype: str
) -> None:
    for result in ranks(world).run(
        "tests.parallel.workers.reductions:sent",
        process_group=False,
        model={**MODELS[model], "num_layers": 4},  # for several buckets
        parallel=parallel,
        dtype=dtype,
    ):
        # Of every bucket that P ranks hold, each sends P - 1 parts of gradients and P - 1 of weights, whatever the
        # number of micro-batches: (P - 1) / P of the bucket twice, as a reduce-scatter and an all-gather must.
        assert (result["micro_batches"] > 1) == (world == 2 or {"tp", "pp"} & parallel.keys() != set())
        messages = result["messages"]
        assert sorted(messages["gradients"]) == sorted(messages["weights"]) == sorted(result["expected"])
        assert result["shared"] > 2 and (result["alone"] > 0) == (model == "moe" and world == 2)
        assert 0 <= result["elements"] - result["parameters"] <= result["padding"]
        assert sum(result["others"].values()) < 100  # token counts, norms and statistics
        # No reduction begins before the last micro-batch's backward pass, and most begin before its last gradient.
        events, first_of_last = result["events"], result["gradients"] * (result["micro_batches"] - 1)
        reductions = [i for i, event in enumerate(events) if event == "reduce"]
        last_gradient = max(i for i, event in enumerate(events) if event == "gradient")
        assert min(reductions) > first_of_last or "vpp" in parallel  # where chunks have their last passes in turn
        assert sum(i < last_gradient for i in reductions) >= len(reductions) / 2
        # Each bucket is gathered before the next is updated.
        after = [event for event in events[last_gradient:] if event in ("update", "gather")]
        assert after.count("gather") == result["shared"] and after[:3] == ["update", "gather", "update"]


@pytest.mark.parametrize(
    ("model", "parallel", "dtype"),
    [("dense_tied", {}, "float32"), ("moe", {"ep": 2}, "bfloat16"), ("dense", {"pp": 2, "vpp": 2}, "float32")],
)
def test_whatever_reads_weights_waits_until_they_have_arrived(
    ranks: RanksOf, model: str, parallel: dict[str, Any], dtype: str
) -> None:
    world = 2 * parallel.get("pp", 1)
    in_time, late = (
        ranks(world).run(
            "tests.parallel.workers.reductions:read",
            process_group=False,
            model={**MODELS[model], "num_layers": max(2, parts_of(parallel))},
            parallel=parallel,
            dtype=dtype,
            late=late,
        )
        for late in (False, True)
    )
    assert late == in_time
    for result in late:
        assert result["pending"] == [] and len(result["weights"]) > 2
        assert result["losses"][2] < result["losses"][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model", "world", "parallel"),
    [
        pytest.param("moe_tied", 4, {"tp": 2, "ep": 2}, marks=pytest.mark.full),
        ("deepseek", 4, {"tp": 2, "sp": True, "ep": 2}),
        ("moe", 2, {"ep": 2}),
    ],
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
