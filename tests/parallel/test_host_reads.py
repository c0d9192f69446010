"""Layers do not ask the device for values, since a GPU's queue runs empty each time."""

from typing import Any

import pytest

from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS


@pytest.mark.parametrize("model", ["dense_tied", "deepseek", "capacity"])
def test_reads_do_not_grow_with_layers_and_micro_batches(ranks: RanksOf, model: str) -> None:
    def reads(num_layers: int, num_batches: int, train: bool) -> dict[str, int]:
        shape: dict[str, Any] = {**MODELS[model], "num_layers": num_layers}
        options = {"model": shape, "num_batches": num_batches, "train": train}
        (found,) = ranks(1).run("tests.parallel.workers.host_reads:reads", process_group=False, **options)
        return found

    one = reads(1, 1, train=True)
    assert one and reads(3, 4, train=True) == one
    assert sum(one.values()) <= 8, one
    assert reads(3, 4, train=False) == reads(1, 1, train=False)


def test_rotary_tables_are_computed_once_a_micro_batch_for_all_chunks(ranks: RanksOf) -> None:
    options = {"model": MODELS["dense"], "parallel": {"pp": 2, "vpp": 2}, "num_batches": 4}
    found = ranks(2).run("tests.parallel.workers.host_reads:rotary_tables", process_group=False, **options)
    assert found == [4, 4]
