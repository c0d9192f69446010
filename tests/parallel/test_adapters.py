"""Adapters and frozen weights in every kind of layout against one rank: losses, gradients, norm, and weights after."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.harness import RanksOf
from tests.parallel.matrix import MODELS, world_of
from tests.parallel.test_layouts import Results, check_same

LORA = {"rank": 4, "alpha": 2.0, "rank_stabilized": True}
DROPPED = {**LORA, "dropout": 0.3}
DORA = {"rank": 3, "alpha": 3.0, "kind": "dora"}
SHARED = {**DORA, "targets": ["q_proj", "o_proj", "gate_proj", "down_proj"]}
MORE = [
    *(("moe_tied", layout, {"adapter": LORA}) for layout in ("tp2", "pp2", "ep2", "zero1", "tp2sp_ep2", "cp2ep2", "tp4")),
    *(("two_kv_heads", layout, {"adapter": LORA}) for layout in ("tp4", "tp4sp")),
    *(("dense", layout, {"adapter": DROPPED, "recompute": "full"}) for layout in ("tp2sp_cp2", "pp2vpp2", "tp2dp2")),
    *(("dense_tied", layout, {"adapter": DORA}) for layout in ("tp2", "tp2sp", "pp2dp2")),
    *(("deepseek", layout, {"adapter": SHARED}) for layout in ("tp2sp_ep2", "pp2")),
    *(("dense_tied", layout, {"freeze": ["embedding*", "layers.[01].*"]}) for layout in ("pp2", "tp2", "pp4")),
]


def results(ranks: RanksOf, folder: Path, model: str, layout: str, options: dict[str, Any]) -> Results:
    """Trains a few steps in a layout; returns what each rank found, and whole tensors by name."""
    world, parallel = world_of(layout)
    out = folder / layout
    out.mkdir()
    found = ranks(world).run(
        "tests.parallel.workers.layouts:run_layout",
        timeout=60 + 30 * world,
        process_group=False,
        model=MODELS[model],
        parallel=parallel,
        out=str(out),
        steps=2,
        **options,
    )
    return found, {name: tensor for file in sorted(out.glob("*")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("model", "layout", "options"),
    [
        ("moe_tied", "tp2_ep2", {"adapter": LORA}),
        *(pytest.param(*each, marks=pytest.mark.full) for each in MORE),
    ],
)
def test_adapters_train_alike_in_every_layout(
    ranks: RanksOf, tmp_path: Path, model: str, layout: str, options: dict[str, Any]
) -> None:
    reference = results(ranks, tmp_path, model, "one", options)
    gradients = {name: tensor for name, tensor in reference[1].items() if name.startswith("grad/")}
    assert all(bool(tensor.any()) for tensor in gradients.values()), "a gradient of zero compares nothing"
    assert len(gradients) < len(reference[1]) / 2
    if "adapter" in options:
        assert all(".adapter." in name for name in gradients)
    check_same(results(ranks, tmp_path, model, layout, options), reference)
