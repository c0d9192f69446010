"""Reward models: the scalar head in a language model's place, at any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.harness import RankError, RanksOf
from tests.parallel.matrix import MODELS, world_of


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
    deeper = {**MODELS["dense_tied"], "num_layers": 3}
    with pytest.raises(RankError, match=r"CheckpointError: .*has no layers\.2\..*, which its model has"):
        ranks(1).run(worker, **options, model=deeper, parallel={}, folder=folder)


def pair_gradients(ranks: RanksOf, layout: str, out: Path, **options: Any) -> tuple[dict[str, float], dict[str, Any]]:
    out.mkdir()
    world, parallel = world_of(layout)
    results = ranks(world).run(
        "tests.parallel.workers.reward_model:pair_gradients",
        process_group=False,
        parallel=parallel,
        out=str(out),
        **options,
    )
    assert all(result == results[0] for result in results)
    return results[0], {name: t for file in sorted(out.glob("*")) for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("layout", "micro_batch_size", "seq_length"),
    [
        ("tp2sp", 1, 48),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                *(("one", 1, 24), ("one", 2, 96), ("zero1", 2, 24), ("tp2", 4, 24), ("pp2", 1, 48)),
                *(("pp2vpp2", 1, 48), ("zero2", 1, 96), ("zero3", 1, 96), ("tp2sp_pp2vpp2", 2, 24)),
            )
        ),
    ],
)
def test_the_gradient_of_pairs_is_the_same_however_they_are_divided(
    ranks: RanksOf, tmp_path: Path, layout: str, micro_batch_size: int, seq_length: int
) -> None:
    """Divides the same pairs by micro-batches, packing and layouts: each counts once in the global mean."""
    expected, reference = pair_gradients(ranks, "one", tmp_path / "one", micro_batch_size=8, seq_length=24)
    options = {"micro_batch_size": micro_batch_size, "seq_length": seq_length}
    found, gradients = pair_gradients(ranks, layout, tmp_path / "other", **options)
    assert found == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == reference.keys() and "value_head.weight" in gradients
    for name, gradient in gradients.items():
        error = torch.linalg.vector_norm(gradient - reference[name]) / torch.linalg.vector_norm(reference[name])
        assert error < 1e-5, f"{name} differs by {error:.1e}"
