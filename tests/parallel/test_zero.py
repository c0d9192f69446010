"""Each ZeRO stage keeps only its share of weights and gradients; a step with infinite gradients changes nothing."""

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.harness import RankPool, RanksOf
from tests.parallel.matrix import BASE, MODELS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_ranks_keep_their_share_alone(ranks: RanksOf, stage: int, dtype: str) -> None:
    results = ranks(2).run(
        "tests.parallel.workers.sharing:kept",
        process_group=False,
        model={**MODELS["moe"], "num_layers": 4},
        parallel={"zero": stage},
        dtype=dtype,
    )
    everything, norms, padding = results[0]["all"], results[0]["norms"], results[0]["padding"]
    gradients, weights = (sum(result[kind] for result in results) for kind in ("gradients", "weights"))
    # Partitions are padded to equal lengths, in stage 3 for each parameter. In fp32 both ranks keep the whole gradient
    # of a parameter that lies in both of their partitions, one for each of the optimizer's two groups.
    border = 2 * results[0]["largest"] if (stage, dtype) == (2, "float32") else 0
    copies = 2 if stage == 1 else 1
    assert copies * everything <= gradients <= copies * everything + padding + border
    assert norms < everything / 50 and border < everything / 5
    copies = 1 if stage == 3 else 2
    assert copies * everything <= weights <= copies * everything + padding + 2 * norms  # norms twice: whole and split


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not count a process's memory")
def test_stage_3_splits_weights_as_they_are_drawn(ranks: RanksOf, rank_pool: RankPool) -> None:
    many_layers = {**BASE, "num_layers": 16, "hidden_size": 256, "ffn_hidden_size": 704}

    def drawn(stage: int) -> list[dict[str, Any]]:
        worker = "tests.parallel.workers.sharing:memory_to_draw"
        # The modules that the first model imports are not counted.
        ranks(2).run(worker, process_group=False, model=BASE, parallel={"zero": stage})
        return ranks(2).run(worker, process_group=False, model=many_layers, parallel={"zero": stage})

    for whole, split in zip(drawn(1), drawn(3), strict=True):
        assert split["same"] and whole["same"]
        assert whole["peak"] > 0.9 * whole["whole"]
        assert split["peak"] < 0.5 * split["whole"] + 0.15 * split["whole"]  # its half, and a few weights on the way
    rank_pool.close()  # these ranks allocate memory more slowly than others


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_do_not_load_the_compiler(ranks: RanksOf, rank_pool: RankPool, stage: int) -> None:
    """Looks for torch.compile in a rank's modules, which takes seconds to import and is only for configs that ask."""
    rank_pool.close()  # ranks that have run a test with compiled layers would have it
    for loaded in ranks(2).run(
        "tests.parallel.workers.sharing:compiler_modules",
        process_group=False,
        model=MODELS["dense"],
        parallel={"zero": stage},
    ):
        assert "torch._inductor.compile_fx" not in loaded, loaded


@pytest.mark.parametrize(
    "parallel", [{"zero": 3}, pytest.param({"tp": 2, "sp": True, "zero": 3}, marks=pytest.mark.full)]
)
def test_no_gathered_weight_is_kept_from_forward_to_backward(ranks: RanksOf, parallel: dict[str, Any]) -> None:
    for result in ranks(2 * parallel.get("tp", 1)).run(
        "tests.parallel.workers.sharing:kept_for_backward",
        process_group=False,
        model={**MODELS["moe_tied"], "num_layers": 4},
        parallel=parallel,
    ):
        assert result["saved"] > 100 and result["gathered"] > 30 and result["held"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "parallel", [{}, {"zero": 2}, {"zero": 3}, {"offload_optimizer": True}, {"zero": 3, "offload_optimizer": True}]
)
def test_an_infinite_loss_on_one_rank_changes_no_weight(ranks: RanksOf, parallel: dict[str, Any], dtype: str) -> None:
    for result in ranks(2).run(
        "tests.parallel.workers.sharing:step_with_an_infinite_loss",
        process_group=False,
        model=MODELS["dense" if parallel else "deepseek"],
        parallel=parallel,
        dtype=dtype,
    ):
        assert "no weight was changed" in result["error"] and result["same"]
