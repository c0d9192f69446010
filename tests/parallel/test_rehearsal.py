"""A rehearsed step asks of its groups what the same step asks over gloo, call by call; differences are named."""

import re
from typing import Any

import pytest

from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS, parts_of

WORKER = "tests.parallel.workers.rehearsal"


def _model(name: str, parallel: dict[str, Any]) -> dict[str, Any]:
    return {**MODELS[name], "num_layers": max(2, parts_of(parallel))}


FEW: list[tuple[str, int, dict[str, Any]]] = [
    ("dense_tied", 2, {}),
    ("dense", 2, {"tp": 2}),
    ("dense_tied", 2, {"pp": 2}),
    ("moe", 2, {"ep": 2}),
    ("dense", 2, {"cp": 2}),
    ("dense_tied", 2, {"zero": 2}),
    ("dense", 2, {"zero": 3}),
]
MORE: list[tuple[str, int, dict[str, Any]]] = [
    ("deepseek", 2, {"tp": 2, "sp": True}),
    ("one_kv_head", 2, {"tp": 2}),
    ("dense", 2, {"pp": 2, "vpp": 2}),
    ("capacity", 2, {"ep": 2}),
    ("deepseek", 4, {"ep": 2, "pp": 2}),
    ("moe_tied", 4, {"tp": 2, "sp": True, "ep": 2}),
    ("two_kv_heads", 4, {"tp": 4}),
    ("dense", 2, {"offload_optimizer": True}),
    ("dense", 2, {"zero": 2, "offload_optimizer": True}),
    ("dense", 2, {"zero": 3, "offload_optimizer": True}),
    ("dense_tied", 4, {"zero": 2, "tp": 2, "sp": True}),
    ("dense_tied", 4, {"zero": 3, "tp": 2}),
    ("moe", 2, {"zero": 2, "ep": 2}),
    ("dense", 2, {"zero": 3, "cp": 2}),
]


@pytest.mark.parametrize(
    ("model", "world", "parallel", "on_cpu"),
    [
        *((*case, False) for case in FEW),
        (*FEW[0], True),
        *(pytest.param(*case, True, marks=pytest.mark.full) for case in [*FEW[1:], *MORE]),
        *(pytest.param(*case, False, marks=pytest.mark.full) for case in MORE),
    ],
)
def test_rehearsed_calls_are_those_of_the_step(
    ranks: RanksOf, model: str, world: int, parallel: dict[str, Any], on_cpu: bool
) -> None:
    options: dict[str, Any] = {"model": _model(model, parallel), "parallel": parallel, "on_cpu": on_cpu}
    real = ranks(world).run(f"{WORKER}:step", process_group=False, **options)
    (rehearsed,) = ranks(1).run(f"{WORKER}:rehearsed", process_group=False, world=world, **options)
    for rank, (calls, expected) in enumerate(zip(rehearsed["calls"], real, strict=True)):
        assert len(expected) > 4
        differing = next((i for i, (a, b) in enumerate(zip(calls, expected, strict=False)) if a != b), None)
        assert calls == expected, f"rank {rank}, call {differing}"
    assert rehearsed["mismatch"] == ""


@pytest.mark.parametrize(
    ("kind", "model", "parallel"),
    [
        ("grpo", "moe", {"ep": 2}),
        ("ppo", "dense", {"tp": 2}),
        ("qlora", "dense", {"tp": 2}),
        ("adalora", "dense_tied", {"pp": 2}),
        pytest.param("adalora", "dense", {"tp": 2}, marks=pytest.mark.full),
        pytest.param("ppo with text", "dense_tied", {"pp": 2}, marks=pytest.mark.full),
        pytest.param("ppo with text", "moe", {"ep": 2}, marks=pytest.mark.full),
        pytest.param("grpo", "dense", {"pp": 2}, marks=pytest.mark.full),
        pytest.param("sft", "dense_tied", {"zero": 3}, marks=pytest.mark.full),
    ],
)
def test_rehearsed_calls_of_fine_tuning_and_rl_are_those_of_the_update(
    ranks: RanksOf, kind: str, model: str, parallel: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"kind": kind, "model": _model(model, parallel), "parallel": parallel, "on_cpu": True}
    real = ranks(2).run(f"{WORKER}:step", process_group=False, **options)
    (rehearsed,) = ranks(1).run(f"{WORKER}:rehearsed", process_group=False, world=2, **options)
    assert rehearsed["calls"] == real and len(real[0]) > 4
    assert rehearsed["mismatch"] == ""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", r"rank 1 enters none"),
        ("smaller", r"rank 1 enters all_reduce of 128 float32 in the sums of gradients \(.*\)"),
    ],
)
def test_a_planted_difference_is_named(ranks: RanksOf, fault: str, words: str) -> None:
    (found,) = ranks(1).run(
        f"{WORKER}:rehearsed",
        process_group=False,
        model=MODELS["dense"],
        parallel={"tp": 2, "sp": True},
        world=2,
        on_cpu=False,
        fault=fault,
    )
    begins = (
        r"ranks 0 and 1 differ in collective no. \d+ of the tp group of ranks 0, 1: rank 0 enters all_reduce of 160 "
        r"float32 in the sums of gradients \(pretrain/parallel/gradients.py:\d+\) and "
    )
    assert re.fullmatch(begins + words, found["mismatch"])


@pytest.mark.parametrize(
    ("model", "parallel"), [("moe_tied", {"ep": 2}), ("dense", {"zero": 2}), ("dense", {"zero": 3})]
)
def test_memory_is_that_of_the_step(ranks: RanksOf, model: str, parallel: dict[str, Any]) -> None:
    for real, rehearsed in ranks(2).run(
        f"{WORKER}:memory", process_group=False, model=MODELS[model], parallel=parallel
    ):
        assert rehearsed == real
        assert real[1]["optimizer"] > 0
