"""Distillation by logits has the same gradient in any layout, goes on bit by bit, and refuses what does not fit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.harness import RanksOf
from tests.parallel.matrix import BASE

LOSSES = ["forward_kl", "reverse_kl", "jsd"]
# Another width, depth and number of heads, and tied embeddings; the student's sizes are BASE's.
TEACHER: dict[str, Any] = {
    **BASE, "num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "tie_embeddings": True,
}  # fmt: skip
BOUND = 1e-5  # of the norm of a difference, relative: fp32 sums in another order

Found = tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]
Gradients = Callable[[int, dict[str, Any], int], Found]


@pytest.fixture(scope="module")
def gradients(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Gradients:
    run = tmp_path_factory.mktemp("teacher") / "run"
    ranks(1).run("tests.parallel.workers.distillation:save", process_group=False, model=TEACHER, run_dir=str(run))

    def gradients(world: int, parallel: dict[str, Any], micro: int) -> Found:
        out = tmp_path_factory.mktemp("gradients")
        found = ranks(world).run(
            "tests.parallel.workers.distillation:gradients",
            process_group=False,
            model=BASE,
            teacher_model=TEACHER,
            teacher_run=str(run),
            parallel=parallel,
            out=str(out),
            micro=micro,
            losses=LOSSES,
        )
        return {name: t for file in sorted(out.iterdir()) for name, t in load_file(file).items()}, found[0]

    return gradients


@pytest.fixture(scope="module")
def expected(gradients: Gradients) -> Found:
    """Gradients by one rank in one micro-batch."""
    return gradients(1, {}, 8)


def assert_same(found: Found, expected: Found) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert float((found[0][name] - tensor).norm()) <= BOUND * float(tensor.norm()), name
    for name, values in expected[1].items():
        assert found[1][name] == pytest.approx(values, rel=1e-5)


def test_tensor_parallel_and_micro_batches(gradients: Gradients, expected: Found) -> None:
    assert_same(gradients(2, {"tp": 2}, 2), expected)
    norms = {name: float(expected[0][f"{name}/layers.0.attention.q_proj.weight"].norm()) for name in LOSSES}
    assert all(norms.values()) and len(set(norms.values())) == 3
    values = expected[1]
    assert values["forward_kl"]["teacher_nll"] == values["jsd"]["teacher_nll"] != values["jsd"]["student_nll"]
    assert 0 < values["jsd"]["agreement"] < 1 and values["jsd"]["loss"] < values["forward_kl"]["loss"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "parallel", "micro"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (2, {"pp": 2}, 1),
        (2, {"pp": 2, "vpp": 2}, 2),
        (2, {"tp": 2, "sp": True}, 2),
        (2, {"cp": 2}, 4),
        (2, {"zero": 3}, 2),
    ],
)
def test_other_layouts(gradients: Gradients, expected: Found, world: int, parallel: dict[str, Any], micro: int) -> None:
    assert_same(gradients(world, parallel, micro), expected)
