"""Losses of RL and SFT have the same gradient however their samples are packed, divided and computed."""

from collections.abc import Callable
from pathlib import Path
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


OTHERS = [
    (2, {"tp": 2}, 2, True),
    (2, {"tp": 2, "sp": True}, 4, False),
    (2, {"pp": 2}, 1, True),
    (2, {"cp": 2}, 2, True),
    (2, {"zero": 3}, 1, False),
]


@pytest.mark.parametrize(
    ("world", "parallel", "micro", "packed"),
    [(1, {}, 1, True), *(pytest.param(*case, marks=pytest.mark.full) for case in ((2, {}, 2, True), *OTHERS))],
)
def test_dialogues_of_fine_tuning(
    ranks: RanksOf, tmp_path: Path, world: int, parallel: dict[str, Any], micro: int, packed: bool
) -> None:
    """Trains on answers of uneven lengths, so that a mean of means over micro-batches, rows or ranks would differ."""

    def gradients(name: str, world: int, parallel: dict[str, Any], micro: int, packed: bool) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        out.mkdir()
        ranks(world).run(
            "tests.parallel.workers.policy_gradients:dialogue_gradients",
            process_group=False,
            model=MODELS["dense"],
            parallel=parallel,
            out=str(out),
            micro=micro,
            seq_length=48 if packed else 24,
        )
        return {name: tensor for file in sorted(out.iterdir()) for name, tensor in load_file(file).items()}

    expected = gradients("one", 1, {}, 8, False)
    assert all(float(tensor.norm()) > 0 for tensor in expected.values())
    assert_same(gradients("other", world, parallel, micro, packed), expected)


MOE = {**MODELS["moe"], "moe": {"num_experts": 8, "top_k": 2, "router_bias": True, "aux_loss_coef": 0.1}}


@pytest.mark.parametrize(
    ("world", "parallel", "micro"),
    [
        (2, {"pp": 2}, 2),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                (1, {}, 1),
                (2, {}, 2),
                (2, {"tp": 2, "sp": True}, 2),
                (2, {"ep": 2}, 4),
                (2, {"cp": 2}, 2),
                (2, {"zero": 3}, 2),
                (4, {"pp": 2, "vpp": 2, "tp": 2}, 2),
            )
        ),
    ],
)
def test_replayed_experts(ranks: RanksOf, tmp_path: Path, world: int, parallel: dict[str, Any], micro: int) -> None:
    """Sends tokens to experts that no router would choose, the same ones in each layout."""
    model = {**MOE, "num_layers": 4} if "vpp" in parallel else MOE

    def gradients(name: str, world: int, chosen: bool, **settings: Any) -> dict[str, torch.Tensor]:
        out = tmp_path / name
        out.mkdir()
        worker = "tests.parallel.workers.policy_gradients:replayed_gradients"
        ranks(world).run(worker, process_group=False, model=model, out=str(out), chosen=chosen, **settings)
        return {name: tensor for file in sorted(out.iterdir()) for name, tensor in load_file(file).items()}

    expected = gradients("one", 1, True, parallel={}, micro=8)
    other = gradients("by_routers", 1, False, parallel={}, micro=8)
    name = next(name for name in expected if name.endswith("router.weight"))
    assert float((expected[name] - other[name]).norm()) > 0.1 * float(expected[name].norm())
    assert_same(gradients("layout", world, True, parallel=parallel, micro=micro), expected)


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
