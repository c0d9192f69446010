"""Every layout against one rank: loss, every gradient, grad norm, and parameters after clipped steps, in fp32.

Gradients may differ by 1e-5, relative (Frobenius), and losses by 1e-6. fp32 rounds at 6e-8, and sums over a few
thousand terms in another order differ by some tens of that.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.harness import RanksOf
from tests.parallel.layout_results import Results, check_copies, check_same
from tests.parallel.matrix import ALLOWED, MODELS, MORE_PAIRS, PAIRS, model_of, world_of
from tests.parallel.workers.layouts import MICRO_BATCH

# Experts are split beside every other thing that is; the other layouts are run in this precision by the full test.
BF16_LAYOUTS = ("tp2sp_ep2", "ep2pp2", "cp2ep2")

RunLayout = Callable[..., Results]


@pytest.fixture(scope="module")
def run(ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    """Runner of (model, layout, options of `run_layout`), which runs each of them once.

    `like` is the layout that the result is compared with, for which the model must have layers enough.
    """
    done: dict[str, Results] = {}

    def run(
        model: str,
        layout: str,
        like: str = "one",
        timeout: float | None = None,
        worker: str = "run_layout",
        **options: Any,
    ) -> Results:
        shape = model_of(model, layout, like)
        key = f"{worker} {model} {shape['num_layers']} {layout} {options}"
        if key not in done:
            out: Path = tmp_path_factory.mktemp(f"{model}_{layout}")
            world, parallel = world_of(layout)
            results = ranks(world).run(
                f"tests.parallel.workers.layouts:{worker}",
                timeout=timeout or 60 + 30 * world,
                process_group=False,
                model=shape,
                parallel=parallel,
                out=str(out),
                **options,
            )
            tensors: dict[str, torch.Tensor] = {}
            for file in sorted(out.glob("*.safetensors")):
                tensors.update(load_file(file))
            done[key] = results, tensors
        return done[key]

    return run


@pytest.mark.parametrize(
    ("model", "layout"), [*PAIRS, *(pytest.param(*pair, marks=pytest.mark.full) for pair in MORE_PAIRS)]
)
def test_layout_computes_what_one_rank_computes(run: RunLayout, model: str, layout: str) -> None:
    check_same(run(model, layout), run(model, "one", like=layout))


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        ("tp2sp", "none"),
        ("ep2pp2", "full"),
        pytest.param("tp2sp_cp2", "none", marks=pytest.mark.full),
        pytest.param("cp2_pp2vpp2", "full", marks=pytest.mark.full),
    ],
)
def test_every_layout_drops_the_same(run: RunLayout, layout: str, recompute: str) -> None:
    (without, *_), _ = run("moe_tied", "one", like=layout)
    reference = run("moe_tied", "one", like=layout, dropout=0.3)
    assert reference[0][0]["losses"][0] != pytest.approx(without["losses"][0], rel=1e-3)
    check_same(run("moe_tied", layout, dropout=0.3, recompute=recompute), reference)


def test_a_rank_draws_its_own_experts_alone(ranks: RanksOf) -> None:
    results = ranks(2).run(
        "tests.parallel.workers.sharing:drawn_experts", process_group=False, model=MODELS["moe"], parallel={"ep": 2}
    )
    for result, own in zip(results, (["0", "1"], ["2", "3"]), strict=True):
        assert result == {"gate_proj": own, "up_proj": own, "down_proj": own}


def test_a_policy_is_sampled_in_the_precision_of_training(ranks: RanksOf) -> None:
    (found,) = ranks(1).run(
        "tests.parallel.workers.posttraining:precision_of_copy", process_group=False, model=MODELS["deepseek"]
    )
    assert found == ["torch.bfloat16"]


def test_clipping_and_auxiliary_loss_take_part(run: RunLayout) -> None:
    (moe, *_), _ = run("moe", "one")
    assert min(moe["norms"]) > 0.1 and moe["moe"]["moe_aux_loss"] >= 1.0  # 1, the minimum, is perfect balance


@pytest.mark.parametrize(
    "layout",
    [
        *("zero1", "tp2sp", "pp2vpp2", "cp2", "ep2", "ep2dp4"),
        *(pytest.param(layout, marks=pytest.mark.full) for layout in ("tp2sp_zero2_offload", "tp2sp_zero3")),
    ],
)
def test_bf16_layouts_stay_close_to_fp32(run: RunLayout, layout: str) -> None:
    """Allows relative errors of a few times 0.4 %, the rounding of bf16 (2^-8); gradients are added up in fp32."""
    (expected, *_), reference = run("moe_tied", "one", like=layout)
    (result, *_), tensors = found = run("moe_tied", layout, dtype="bfloat16")
    check_copies(found)
    assert result["losses"] == pytest.approx(expected["losses"], rel=0.01)
    assert result["norms"] == pytest.approx(expected["norms"], rel=0.05)
    for name in ("grad/layers.0.attention.q_proj.weight", "grad/layers.0.attention_norm.weight"):
        error = torch.linalg.vector_norm(tensors[name] - reference[name]) / torch.linalg.vector_norm(reference[name])
        assert 1e-5 < error < 0.1, "bf16 rounding shows, and no more than that"


@pytest.mark.parametrize(
    "layout",
    [
        layout if layout in BF16_LAYOUTS else pytest.param(layout, marks=pytest.mark.full)
        for model, layout in ALLOWED
        if model == "deepseek"
    ],
)
def test_bf16_ranks_clip_by_one_norm_and_stay_together(run: RunLayout, layout: str) -> None:
    """Compares the gradient norm of all ranks, also with experts, and their weights after clipping by it.

    The losses are near one rank's, but not as near as in fp32: a rounding lets some tokens choose other experts.
    """
    (expected, *_), _ = run("deepseek", "one", like=layout, dtype="bfloat16")
    found = run("deepseek", layout, dtype="bfloat16")
    check_copies(found)
    assert found[0][0]["losses"] == pytest.approx(expected["losses"], rel=0.01)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_are_accumulated_and_averaged_in_fp32(run: RunLayout, stage: int, offload: bool) -> None:
    """Compares gradients with one rank's times dp = 2, which those of each micro-batch are exactly.

    Sums in fp32 differ by a few times fp32's rounding (6e-8), a sum in bf16 would differ by 2e-3. For stage 3 the one
    rank, too, computes column layers one by one, which rounds the gradient of their input otherwise.
    """
    _, expected = run("moe_tied", "one", dtype="bfloat16", columns_apart=stage == 3, micro_batch=MICRO_BATCH)
    _, found = run("moe_tied", f"zero{stage}{'_offload' if offload else ''}", dtype="bfloat16")
    names = [name for name in expected if name.startswith("grad/")]
    assert len(names) > 20
    for name in names:
        error = torch.linalg.vector_norm(found[name] - expected[name]) / torch.linalg.vector_norm(expected[name])
        assert error < 1e-6, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize(
    ("model", "layout", "recompute"),
    [
        ("dense", "tp2sp", "selective"),
        ("moe_tied", "pp2vpp2", "full"),
        ("deepseek", "cp2ep2", "full"),
        pytest.param("dense", "tp2sp", "full", marks=pytest.mark.full),
        pytest.param("moe_tied", "pp2vpp2", "selective", marks=pytest.mark.full),
        pytest.param("deepseek", "cp2ep2", "selective", marks=pytest.mark.full),
        ("moe_tied", "zero3", "full"),
        pytest.param("moe_tied", "tp2sp_zero3", "selective", marks=pytest.mark.full),
        pytest.param("moe_tied", "tp2sp_zero3", "full", marks=pytest.mark.full),
    ],
)
def test_recomputing_activations_changes_nothing(run: RunLayout, model: str, layout: str, recompute: str) -> None:
    results, tensors = run(model, layout, recompute=recompute)
    expected, reference = run(model, layout)
    assert results == expected  # bit by bit: the same kernels on the same numbers
    assert tensors.keys() == reference.keys()
    assert all(torch.equal(tensors[name], reference[name]) for name in tensors)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("moe_tied", "tp2sp"),
        ("moe_tied", "pp2vpp2"),
        ("deepseek", "cp2ep2"),
        pytest.param("moe_tied", "zero2", marks=pytest.mark.full),
        pytest.param("moe_tied", "zero3", marks=pytest.mark.full),
    ],
)
def test_ranks_on_one_gpu_compute_the_same_through_the_host(run: RunLayout, model: str, layout: str) -> None:
    results, tensors = run(model, layout, worker="run_staged")
    expected, reference = run(model, layout)
    assert results == expected  # bit by bit: gloo adds up in the same order
    assert tensors.keys() == reference.keys()
    assert all(torch.equal(tensors[name], reference[name]) for name in tensors)


@pytest.mark.full
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("dense_tied", "one"),
        ("dense_tied", "tp2sp"),
        ("dense_tied", "pp2vpp2"),
        ("dense_tied", "cp2"),
        ("dense_tied", "zero3"),
        ("deepseek", "one"),
        ("deepseek", "ep2dp4"),
        ("delta", "one"),
        ("delta", "pp2vpp2"),
    ],
)
def test_compiled_blocks_compute_the_same(run: RunLayout, model: str, layout: str) -> None:
    check_same(run(model, layout, compile_blocks=True, timeout=1200), run(model, "one", like=layout))
