"""Losses of reinforcement learning have the same gradient however their samples are packed, divided and computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain.algorithms.dialects import DIALECTS
from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS

BOUND = 1e-5  # of the norm of a difference, relative: fp32 sums in another order
NAMES = sorted(DIALECTS)

Gradients = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def gradients(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Gradients:
    def gradients(world: int, parallel: dict[str, Any], micro: int, packed: bool) -> dict[str, torch.Tensor]:
        out = tmp_path_factory.mktemp("gradients")
        ranks(world).run(
            "tests.parallel.workers.policy_gradients:gradients",
            process_group=False,
            model=MODELS["dense"],
            parallel=parallel,
            out=str(out),
            micro=micro,
            packed=packed,
            dialects=NAMES,
        )
        return {name: tensor for file in sorted(out.iterdir()) for name, tensor in load_file(file).items()}

    return gradients


@pytest.fixture(scope="module")
def expected(gradients: Gradients) -> dict[str, torch.Tensor]:
    """Gradients by one rank in one micro-batch, a sample a row."""
    return gradients(1, {}, 8, False)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm()) <= BOUND * float(tensor.norm()), name


def test_micro_batches_packing_and_data_parallel(gradients: Gradients, expected: dict[str, torch.Tensor]) -> None:
    assert_same(gradients(2, {}, 1, True), expected)
    norms = {name: float(expected[f"{name}/layers.0.attention.q_proj.weight"].norm()) for name in NAMES}
    assert all(norms.values()) and norms["gspo"] != norms["grpo@trl"] != norms["cispo@minimax"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("world", "parallel", "micro", "packed"),
    [
        (1, {}, 1, False),
        (1, {}, 2, True),
        (2, {"tp": 2}, 2, False),
        (2, {"tp": 2, "sp": True}, 2, True),
        (2, {"pp": 2}, 1, True),
    ],
)
def test_other_layouts(
    gradients: Gradients,
    expected: dict[str, torch.Tensor],
    world: int,
    parallel: dict[str, Any],
    micro: int,
    packed: bool,
) -> None:
    assert_same(gradients(world, parallel, micro, packed), expected)
