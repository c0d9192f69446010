"""Reward models: the scalar head in a language model's place, at any layout."""

from pathlib import Path

import pytest

from tests.parallel.harness import RankError, RanksOf
from tests.parallel.matrix import MODELS


def test_a_value_head_begins_anew_on_a_language_model_and_nothing_else_may_be_missing(
    ranks: RanksOf, tmp_path: Path
) -> None:
    worker, options = "tests.parallel.workers.reward_model:with_value_head", {"process_group": False}
    folder = str(tmp_path)
    (saved,) = ranks(1).run(worker, **options, model=MODELS["dense_tied"], parallel={}, folder=folder)
    found = ranks(2).run(worker, **options, model=MODELS["dense_tied"], parallel={"pp": 2}, folder=folder)
    assert [result["new"] for result in found] == [["value_head.weight"]] * 2
    same = {name: digest for result in found for name, digest in result["weights"].items()}
    assert same.keys() - saved["weights"].keys() == {"value_head.weight"}
    assert same["value_head.weight"] == found[1]["drawn"]
    assert all(same[name] == digest for name, digest in saved["weights"].items())
    deeper = {**MODELS["dense_tied"], "num_layers": 5}
    with pytest.raises(RankError, match=r"CheckpointError: .*has no layers\.4\..*, which its model has"):
        ranks(1).run(worker, **options, model=deeper, parallel={}, folder=folder)
