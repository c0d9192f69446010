"""Layers do not ask the device for values, since a GPU's queue runs empty each time."""

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS, model_of


@pytest.mark.parametrize("model", ["dense_tied", "deepseek", "capacity"])
def test_reads_do_not_grow_with_layers_and_micro_batches(ranks: RanksOf, model: str) -> None:
    def reads(num_layers: int, num_batches: int, train: bool) -> dict[str, int]:
        shape: dict[str, Any] = {**MODELS[model], "num_layers": num_layers}
        options = {"model": shape, "num_batches": num_batches, "train": train}
        (found,) = ranks(1).run("tests.parallel.workers.host_reads:reads", process_group=False, **options)
        return found

    for train in (True, False):
        assert reads(3, 4, train) == reads(1, 1, train) == {}


@pytest.mark.parametrize(("model", "parallel"), [("dense", {"tp": 2}), ("deepseek", {})])
def test_the_loop_reads_one_copy_a_step_when_the_next_step_is_under_way(
    ranks: RanksOf, tmp_path: Path, model: str, parallel: dict[str, int]
) -> None:
    def loop(steps: int) -> list[dict[str, Any]]:
        options = {"model": MODELS[model], "parallel": parallel, "run_dir": str(tmp_path / str(steps)), "steps": steps}
        return ranks(2).run("tests.parallel.workers.host_reads:loop", process_group=False, **options)

    for three, eight in zip(loop(3), loop(8), strict=True):
        # The last step is saved and evaluated, which ask for values, once in each run.
        assert eight["events"] == ["step", *["step", "fetch"] * 7, "fetch", "fetch"]
        more = {key.split(":")[0] for key, count in eight["reads"].items() if count > three["reads"].get(key, 0)}
        # All of these read host memory: the rows before they are sent to the device, and what was fetched from there.
        copied = {"loss", "weights", "mean_loss", "mean_losses", "metrics", "busy", "grad_norm", "_host", "<dictcomp>"}
        rows = {"batch_source.py collate", "documents.py of"}
        described = {"expert_balance.py described", "expert_balance.py <dictcomp>", "details.py described"}
        assert more <= {f"step_sums.py {name}" for name in copied} | described | rows
        assert "step_sums.py mean_loss" in more


def test_rotary_tables_are_computed_once_a_micro_batch_for_all_chunks(ranks: RanksOf) -> None:
    options = {"model": model_of("dense", "pp2vpp2"), "parallel": {"pp": 2, "vpp": 2}, "num_batches": 4}
    found = ranks(2).run("tests.parallel.workers.host_reads:rotary_tables", process_group=False, **options)
    assert found == [4, 4]
