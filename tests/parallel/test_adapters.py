"""Adapters and frozen weights in every kind of layout against one rank: losses, gradients, norm, and weights after."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from configs.loader import validate
from configs.model import ModelConfig
from pretrain.checkpoint import storage
from pretrain.checkpoint.whole_model import ModelReader
from pretrain.model import build_single
from pretrain.model.adapters import is_adapter, nf4
from tests.parallel.harness import RanksOf
from tests.parallel.layout_results import Results, check_same
from tests.parallel.matrix import MODELS, model_of, world_of
from tests.parallel.runs import assert_same_state, metrics, train

LORA = {"rank": 4, "alpha": 2.0, "rank_stabilized": True}
DROPPED = {**LORA, "dropout": 0.3}
DORA = {"rank": 3, "alpha": 3.0, "kind": "dora"}
SHARED = {**DORA, "targets": ["q_proj", "o_proj", "gate_proj", "down_proj"]}
QLORA: dict[str, Any] = {"rank": 4, "alpha": 2.0, "base": "nf4"}
IN_ATTENTION: dict[str, Any] = {"targets": ["q_proj", "k_proj", "o_proj"]}
BOTTLENECK = {"kind": "bottleneck", "bottleneck_size": 5}
PROMPT: dict[str, Any] = {"kind": "prompt", "virtual_tokens": 3}
P_TUNING = {"kind": "p_tuning", "virtual_tokens": 3, "encoder": "lstm", "encoder_size": 5}
PREFIX: dict[str, Any] = {"kind": "prefix", "virtual_tokens": 3, "encoder_size": 6}
P_TUNING_V2: dict[str, Any] = {"kind": "p_tuning_v2", "virtual_tokens": 3}
ADALORA: dict[str, Any] = {"kind": "adalora", "rank": 4, "alpha": 4.0, "target_rank": 2, "prune_every": 1}
SOON = {**ADALORA, "budget_steps": 2}
MORE = [
    *(
        ("moe_tied", layout, {"adapter": LORA})
        for layout in ("tp2", "pp2", "ep2", "zero1", "tp2sp_ep2", "cp2ep2", "tp4")
    ),
    *(("two_kv_heads", layout, {"adapter": LORA}) for layout in ("tp4", "tp4sp")),
    *(("dense", layout, {"adapter": DROPPED, "recompute": "full"}) for layout in ("tp2sp_cp2", "pp2vpp2", "tp2dp2")),
    *(("dense_tied", layout, {"adapter": DORA}) for layout in ("tp2", "tp2sp", "pp2dp2")),
    *(("deepseek", layout, {"adapter": SHARED}) for layout in ("tp2sp_ep2", "pp2")),
    *(("dense_tied", layout, {"adapter": BOTTLENECK}) for layout in ("tp2", "pp2vpp2", "cp2")),
    ("moe_tied", "tp2sp_ep2", {"adapter": BOTTLENECK}),
    *(("dense_tied", layout, {"adapter": QLORA}) for layout in ("tp2sp", "pp2", "zero1")),
    ("two_kv_heads", "tp4", {"adapter": {**QLORA, **IN_ATTENTION}, "recompute": "full"}),
    *(("dense_tied", layout, {"adapter": SOON}) for layout in ("tp2", "tp2sp", "pp2dp2", "cp2")),
    ("two_kv_heads", "tp4", {"adapter": {**SOON, **IN_ATTENTION}}),
    *(("dense_tied", layout, {"adapter": PROMPT}) for layout in ("tp2", "pp2vpp2", "tp2dp2")),
    *(("dense", layout, {"adapter": P_TUNING, "recompute": "full"}) for layout in ("pp2", "zero1")),
    *(("dense_tied", layout, {"adapter": PREFIX}) for layout in ("pp2vpp2", "tp2sp", "pp2dp2")),
    *(("moe_tied", layout, {"adapter": PREFIX}) for layout in ("tp2sp_ep2", "pp2")),
    *(("two_kv_heads", layout, {"adapter": PREFIX, "recompute": "selective"}) for layout in ("tp4", "tp4sp")),
    *(("two_kv_heads", layout, {"adapter": P_TUNING_V2}) for layout in ("tp4", "pp2")),
    *(("dense_tied", layout, {"freeze": ["embedding*", "layers.0.*"]}) for layout in ("pp2", "tp2", "pp4")),
]


def results(
    ranks: RanksOf, folder: Path, model: str, layout: str, options: dict[str, Any], like: str = "one"
) -> Results:
    """Trains a few steps in a layout; returns what each rank found, and whole tensors by name.

    `like` is the layout that the result is compared with, for which the model must have layers enough.
    """
    world, parallel = world_of(layout)
    out = folder / layout
    out.mkdir()
    found = ranks(world).run(
        "tests.parallel.workers.layouts:run_layout",
        timeout=60 + 30 * world,
        process_group=False,
        model=model_of(model, layout, like),
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
        ("dense_tied", "tp2sp", {"adapter": BOTTLENECK}),
        ("dense_tied", "tp2dp2", {"adapter": SOON}),
        ("dense_tied", "tp2", {"adapter": QLORA}),
        ("dense", "tp2", {"adapter": P_TUNING}),
        ("dense_tied", "pp2", {"adapter": PREFIX}),
        *(pytest.param(*each, marks=pytest.mark.full) for each in MORE),
    ],
)
def test_adapters_train_alike_in_every_layout(
    ranks: RanksOf, tmp_path: Path, model: str, layout: str, options: dict[str, Any]
) -> None:
    reference = results(ranks, tmp_path, model, "one", options, like=layout)
    gradients = {name: tensor for name, tensor in reference[1].items() if name.startswith("grad/")}
    assert all(bool(tensor.any()) for tensor in gradients.values()), "a gradient of zero compares nothing"
    assert len(gradients) < len(reference[1]) / 2
    if "adapter" in options:
        assert all(is_adapter(name.removeprefix("grad/")) for name in gradients)
    check_same(results(ranks, tmp_path, model, layout, options), reference)


def test_an_adapter_run_saves_what_it_trains_and_names_its_base(ranks: RanksOf, tmp_path: Path) -> None:
    """Tunes a model on two ranks: a run that stops goes on bit by bit, and reads its base also after that is gone."""
    base, straight, broken = (tmp_path / name for name in ("base", "straight", "broken"))
    assert train(ranks(1), base, "moe_tied", {}, steps=2) == [{"status": 0}]
    begun = storage.directory(base, 2)
    options: dict[str, Any] = {"adapter": LORA, "init": str(begun)}
    assert train(ranks(2), straight, "moe_tied", {"tp": 2}, **options) == [{"status": 0}] * 2
    train(ranks(2), broken, "moe_tied", {"tp": 2}, fail_at=5, **options)
    assert train(ranks(2), broken, "moe_tied", {"tp": 2}, **options) == [{"status": 0}] * 2
    assert metrics(broken) == metrics(straight)
    own = storage.directory(straight, 6)
    assert_same_state(own, storage.directory(broken, 6))

    names = storage.read_manifest(own)["parameters"]
    assert names and all(".adapter." in name for name in names)
    with storage.Reader(begun) as first, ModelReader(own) as whole:
        assert whole.shapes == first.shapes
        frozen = "embedding.weight", "final_norm.weight", "layers.1.moe.router.weight"
        assert all(torch.equal(whole.read(name), first.read(name)) for name in frozen)
        assert not torch.equal(whole.read("layers.1.moe.experts.up_proj"), first.read("layers.1.moe.experts.up_proj"))
        first_embedding = first.read(frozen[0])

    answers = train(ranks(2), broken, "moe_tied", {"tp": 2}, steps=8, **{**options, "adapter": {**LORA, "rank": 5}})
    assert "adapter.rank 4 -> 5" in answers[0]["error"]
    moved = tmp_path / "moved"
    moved.mkdir()
    base.rename(moved / "away")  # for the run the same as if it were deleted or pruned
    straight = straight.rename(moved / "elsewhere")
    own = storage.directory(straight, 6)
    with ModelReader(own) as whole:
        assert torch.equal(whole.read(frozen[0]), first_embedding), "the run keeps its base's files"
    shutil.rmtree(straight / "base")
    with pytest.raises(storage.CheckpointError, match=r"trained on top of .*step_2, which is gone; put the model back"):
        ModelReader(own)
    (moved / "away").rename(base)
    with ModelReader(own) as whole:
        assert torch.equal(whole.read(frozen[0]), first_embedding), "the remedy works"


def test_adalora_shares_a_budget_and_goes_on_bit_by_bit(ranks: RanksOf, tmp_path: Path) -> None:
    """Stops a run while its ranks fall: it goes on as if it had not, and what it has pruned at the end is zero."""
    base, straight, broken = (tmp_path / name for name in ("base", "straight", "broken"))
    assert train(ranks(1), base, "dense_tied", {}, steps=2) == [{"status": 0}]
    adapter = {**ADALORA, "warmup_steps": 1, "budget_steps": 4, "targets": ["q_proj", "o_proj", "down_proj"]}
    options: dict[str, Any] = {"adapter": adapter, "init": str(storage.directory(base, 2)), "steps": 5}
    assert train(ranks(2), straight, "dense_tied", {"pp": 2}, **options) == [{"status": 0}] * 2
    train(ranks(2), broken, "dense_tied", {"pp": 2}, fail_at=3, **options)
    assert train(ranks(2), broken, "dense_tied", {"pp": 2}, **options) == [{"status": 0}] * 2
    assert metrics(broken) == metrics(straight)
    own = storage.directory(straight, 5)
    assert_same_state(own, storage.directory(broken, 5))

    saved = storage.steps(straight)[0]
    before = storage.read_full(storage.directory(straight, saved))
    vectors = [t if name.endswith(".a") else t.t() for name, t in before.items() if name.endswith((".adapter.a", ".b"))]
    missing = sum(float((v @ v.t() - torch.eye(len(v))).square().sum()) for v in vectors)
    logged = {line["step"]: line["orthogonality_penalty"] for line in metrics(straight) if "loss" in line}
    assert logged[saved + 1] == pytest.approx(0.1 * missing, rel=1e-4) and logged[saved + 1] > 0

    values = storage.read_full(own)
    kept = [name for name in values if name.endswith(".kept")]
    ranks_left = [int(values[name].sum()) for name in kept]
    assert sum(ranks_left) == 2 * len(kept) and len({name.split(".")[1] for name in kept}) * 3 == len(kept)
    for name in kept:
        lambdas = values[name.replace(".kept", ".lambdas")]
        assert bool((lambdas[values[name] == 0] == 0).all()) and bool((lambdas[values[name] == 1] != 0).all())
    name, reader = "layers.0.attention.q_proj", storage.Reader(own)
    with ModelReader(own) as whole, storage.Reader(storage.directory(base, 2)) as first, reader:
        a, b, lambdas = (reader.read(f"{name}.adapter.{part}") for part in ("a", "b", "lambdas"))
        assert torch.allclose(whole.read(f"{name}.weight") - first.read(f"{name}.weight"), b * lambdas @ a, atol=1e-6)
        assert not any(is_adapter(name) for name in whole.shapes)


@pytest.mark.full
def test_qlora_saves_adapters_alone_and_is_read_with_the_values_it_was_trained_on(
    ranks: RanksOf, tmp_path: Path
) -> None:
    """Trains QLoRA: refused without a trained base, resumed bit by bit, with the held-out loss of the merged model."""
    base, straight, broken = (tmp_path / name for name in ("base", "straight", "broken"))
    refused = train(ranks(1), base, "dense_tied", {}, adapter=QLORA)
    assert "name a model in [init], or set adapter.base=full" in refused[0]["error"]
    assert train(ranks(1), base, "dense_tied", {}, steps=2) == [{"status": 0}]
    begun = storage.directory(base, 2)
    options: dict[str, Any] = {"adapter": QLORA, "init": str(begun), "steps": 4}
    assert train(ranks(2), straight, "dense_tied", {"tp": 2}, **options) == [{"status": 0}] * 2
    train(ranks(2), broken, "dense_tied", {"tp": 2}, fail_at=3, **options)
    assert train(ranks(2), broken, "dense_tied", {"tp": 2}, **options) == [{"status": 0}] * 2
    assert metrics(broken) == metrics(straight)
    own = storage.directory(straight, 4)
    assert_same_state(own, storage.directory(broken, 4))
    values = storage.read_full(own)
    assert values and all(is_adapter(name) for name in values)

    name, scale = "layers.0.attention.q_proj", QLORA["alpha"] / QLORA["rank"]
    with ModelReader(own) as whole, storage.Reader(begun) as first:
        added = scale * values[f"{name}.adapter.b"] @ values[f"{name}.adapter.a"]
        assert torch.allclose(
            whole.read(f"{name}.weight"), nf4.rounded(first.read(f"{name}.weight")) + added, atol=1e-6
        )
        assert torch.equal(whole.read("embedding.weight"), first.read("embedding.weight"))


@pytest.mark.parametrize(
    "adapter",
    [
        PROMPT,
        *(pytest.param(each, marks=pytest.mark.full) for each in (BOTTLENECK, P_TUNING, PREFIX, P_TUNING_V2)),
    ],
    ids=lambda adapter: adapter["kind"],
)
def test_adapters_that_cannot_be_merged_are_kept_beside_the_weights(
    ranks: RanksOf, tmp_path: Path, adapter: dict[str, Any]
) -> None:
    """Resumes a run bit by bit, opens its checkpoint as a model with adapters, and trains or refuses a later run."""
    base, straight, broken, later = (tmp_path / name for name in ("base", "straight", "broken", "later"))
    assert train(ranks(1), base, "dense_tied", {}, steps=2) == [{"status": 0}]
    options: dict[str, Any] = {"adapter": adapter, "init": str(storage.directory(base, 2)), "steps": 3}
    assert train(ranks(1), straight, "dense_tied", {}, **options) == [{"status": 0}]
    train(ranks(1), broken, "dense_tied", {}, fail_at=2, **options)
    assert train(ranks(1), broken, "dense_tied", {}, **options) == [{"status": 0}]
    assert metrics(broken) == metrics(straight)
    own = storage.directory(straight, 3)
    assert_same_state(own, storage.directory(broken, 3))

    tokens, positions = torch.arange(20).view(2, 10), torch.arange(10).expand(2, 10)
    model = validate(ModelConfig, MODELS["dense_tied"])
    with ModelReader(own) as whole:
        assert whole.adapter is not None and whole.adapter.kind == adapter["kind"]
        weights = {name: whole.read(name) for name in whole.shapes}
        logits = build_single(model, weights, adapter=whole.adapter)(tokens, positions)
        plain = {name: tensor for name, tensor in weights.items() if not is_adapter(name)}
        assert not torch.allclose(logits, build_single(model, plain)(tokens, positions), atol=1e-3)

    options["init"] = str(own)
    assert train(ranks(1), later, "dense_tied", {}, **options) == [{"status": 0}]
    with ModelReader(storage.directory(later, 3)) as more:
        assert any(not torch.equal(more.read(name), whole) for name, whole in weights.items())
    refused = train(ranks(1), tmp_path / "other", "dense_tied", {}, **{**options, "adapter": None})
    assert f'set adapter.kind="{adapter["kind"]}", ' in refused[0]["error"]


@pytest.mark.parametrize(
    ("parallel", "adapter", "way"),
    [
        ({}, LORA, "whole"),
        ({"tp": 2}, LORA, "whole"),
        ({"tp": 2}, LORA, "split"),
        pytest.param({"tp": 2}, PREFIX, "split", marks=pytest.mark.full),
        *(
            pytest.param({"tp": 2}, adapter, "whole", marks=pytest.mark.full)
            for adapter in (PREFIX, {**QLORA, **IN_ATTENTION})
        ),
    ],
)
def test_completions_are_sampled_with_adapters(
    ranks: RanksOf, parallel: dict[str, int], adapter: dict[str, Any], way: str
) -> None:
    """Samples with adapters that begin with something to add: the base alone would differ by more than 1."""
    worker = "tests.parallel.workers.posttraining:copy_has_adapters"
    options = {"model": MODELS["moe_tied"], "parallel": parallel, "adapter": adapter, "way": way}
    found = ranks(parallel.get("tp", 1)).run(worker, process_group=False, **options)
    assert max(found) < 1e-4


@pytest.mark.parametrize(
    ("model", "parallel", "adapter"),
    [
        ("moe_tied", {"tp": 2}, LORA),
        *(pytest.param("dense_tied", {"pp": 2}, each, marks=pytest.mark.full) for each in (DORA, PROMPT, BOTTLENECK)),
        pytest.param("dense_tied", {"tp": 2}, PREFIX, marks=pytest.mark.full),
    ],
)
def test_with_adapters_off_a_model_is_its_base_bit_by_bit(
    ranks: RanksOf, model: str, parallel: dict[str, int], adapter: dict[str, Any]
) -> None:
    def digests(adapter: dict[str, Any] | None) -> list[dict[str, str]]:
        worker, options = "tests.parallel.workers.posttraining:logprobs_on_and_off", {"model": MODELS[model]}
        return ranks(2).run(worker, process_group=False, parallel=parallel, adapter=adapter, **options)

    for base, tuned in zip(digests(None), digests(adapter), strict=True):
        assert tuned["off"] == base["on"] != tuned["on"] == tuned["on again"]
