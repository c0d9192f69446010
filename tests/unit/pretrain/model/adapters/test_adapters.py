"""Config and modules of parameter-efficient tuning on one rank."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from configs.adapters import AdapterConfig
from configs.loader import ConfigError, plain, validate
from configs.model import ModelConfig
from configs.train import TrainerConfig
from pretrain.model import Decoder, LayerContext, build_single, init_weights
from pretrain.model.adapters import add_adapters, is_adapter, merged
from pretrain.model.adapters.adalora import budget, penalty, penalty_gradient
from pretrain.model.adapters.bottleneck import Bottleneck
from tests.parallel.part_models import PART_MODELS

TINY = {"vocab_size": 32, "num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "num_heads": 4, "num_kv_heads": 2}
TOKENS, POSITIONS = torch.arange(10)[None] % 32, torch.arange(10)[None]


def decoder(adapter: dict[str, Any] | None = None, std: float = 0.0, **model: Any) -> Decoder:
    """Builds a decoder with drawn weights; equal names have equal weights, with and without adapters."""
    built = Decoder(validate(ModelConfig, {**TINY, **model}))
    if adapter is not None:
        add_adapters(built, validate(AdapterConfig, adapter), LayerContext(), std)
    init_weights(built, seed=3)
    return built.eval()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kind": "bottleneck", "rank": 4}, "adapter.rank = 4 has no meaning for adapter.kind = 'bottleneck', whose"),
        ({"bottleneck_size": 8}, "adapter.bottleneck_size = 8 has no meaning for adapter.kind = 'lora'"),
        (
            {"kind": "adalora"},
            "budget_steps = 0 is not after adapter.warmup_steps = 0, .* set adapter.budget_steps=1",
        ),
        (
            {"kind": "adalora", "budget_steps": 9, "target_rank": 9},
            "target_rank = 9 is more than adapter.rank = 8",
        ),
        ({"kind": "bottleneck", "after": []}, "must name attention, mlp, or each of them once"),
    ],
)
def test_a_key_without_meaning_for_the_kind_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(AdapterConfig, keys)


@pytest.mark.parametrize("keys", [{"kind": "bottleneck", "after": ["mlp"]}, {"kind": "dora", "targets": ["q_proj"]}])
def test_a_written_config_reads_as_itself(keys: dict[str, Any]) -> None:
    config = validate(AdapterConfig, keys)
    assert validate(AdapterConfig, plain(config)) == config


@pytest.mark.parametrize("adapter", [{"dropout": 0.5}, {"kind": "bottleneck"}, {"kind": "prefix"}])
def test_adapters_of_a_model_that_samples_have_no_dropout(adapter: dict[str, Any]) -> None:
    """Adds them to a model in eval mode, as the decoder does whose weights are split over ranks."""
    built = Decoder(validate(ModelConfig, TINY)).eval()
    add_adapters(built, validate(AdapterConfig, adapter), LayerContext())
    assert not any(module.training for module in built.modules())


@pytest.mark.parametrize("kind", ["pre", "sandwich", "parallel"])
def test_bottlenecks_begin_as_the_base_and_then_add_what_the_paper_says(kind: str) -> None:
    """Compares the first logits with the base's bit by bit, and a trained adapter with the paper's figure 2."""
    base = decoder(residual={"kind": kind})(TOKENS, POSITIONS)
    tuned = decoder({"kind": "bottleneck", "bottleneck_size": 4}, residual={"kind": kind})
    assert torch.equal(tuned(TOKENS, POSITIONS), base)
    names = [name for name, _ in tuned.named_global_parameters() if is_adapter(name)]
    assert len(names) == 2 * 2 * 4 and "layers.1.adapter.mlp.down" in names

    trained = decoder({"kind": "bottleneck", "bottleneck_size": 4}, std=0.5, residual={"kind": kind})
    assert not torch.allclose(trained(TOKENS, POSITIONS), base, atol=1e-5)
    adapter, y = trained.blocks[0].adapter["mlp"], torch.randn(3, 2, 16)
    assert isinstance(adapter, Bottleneck)
    added = F.gelu(y @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias
    assert torch.allclose(adapter(y), y + added)


def test_pfeiffers_adapter_follows_the_mlp_alone() -> None:
    tuned = decoder({"kind": "bottleneck", "after": ["mlp"], "activation": "relu"})
    assert [list(block.adapter) for block in tuned.blocks.values()] == [["mlp"]] * 2


VIRTUAL = [{"kind": kind, "virtual_tokens": 3} for kind in ("prompt", "p_tuning", "prefix", "p_tuning_v2")]


@pytest.mark.parametrize("model", [{}, {"attention": {"pattern": "sliding", "window": 5, "softcap": 9.0}}])
@pytest.mark.parametrize("adapter", VIRTUAL, ids=lambda adapter: adapter["kind"])
@torch.no_grad()
def test_virtual_tokens_stand_before_every_document_and_in_the_cache(
    adapter: dict[str, Any], model: dict[str, Any]
) -> None:
    """Compares a packed row with its documents alone, and a cache with the whole text."""
    tuned = decoder(adapter, **model)
    segments, positions = torch.tensor([[0] * 4 + [1] * 6]), torch.tensor([[*range(4), *range(6)]])
    alone = [tuned(TOKENS[:, part], positions[:, part]) for part in (slice(4), slice(4, 10))]
    assert torch.allclose(tuned(TOKENS, positions, segments), torch.cat(alone, 1), atol=1e-6)

    whole, cache = tuned(TOKENS, POSITIONS), tuned.new_cache(1, 10)
    parts = [tuned(TOKENS[:, :4], POSITIONS[:, :4], None, cache)]
    for i in range(4, 10):
        cache.longest = i
        parts.append(tuned(TOKENS[:, i : i + 1], POSITIONS[:, i : i + 1], None, cache))
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-6)
    assert not torch.allclose(whole, decoder(**model)(TOKENS, POSITIONS), atol=1e-3)


@pytest.mark.parametrize(
    ("adapter", "model", "said"),
    [
        ("prompt", {"moe": {"num_experts": 4}}, "adapter.kind = 'prompt' is for dense models"),
        ("p_tuning_v2", {"attention": PART_MODELS["delta"]["attention"]}, "which layers that are gated delta nets"),
        (
            "p_tuning_v2",
            {"position": {"kind": "learned", "max_positions": 16}},
            r"adapter.virtual_tokens = 20 and train.seq_length = 12 exceed .* = 16; set adapter.virtual_tokens=4 or",
        ),
    ],
)
def test_a_model_that_cannot_have_virtual_tokens_is_refused(adapter: str, model: dict[str, Any], said: str) -> None:
    config = validate(AdapterConfig, {"kind": adapter})
    with pytest.raises(ConfigError, match=said):
        config.check_model(validate(ModelConfig, {**TINY, **model}), seq_length=12)


def test_ranks_that_split_sequences_have_no_virtual_tokens() -> None:
    with pytest.raises(ValueError, match=r"parallel.cp = 2 splits sequences, .*; set parallel.cp=1"):
        AdapterConfig(kind="prefix").check_layout(cp=2, sp=False)
    with pytest.raises(ValueError, match=r"parallel.sp = true splits sequences, .*; set parallel.sp=false"):
        AdapterConfig(kind="p_tuning").check_layout(cp=1, sp=True)
    AdapterConfig(kind="prefix").check_layout(cp=1, sp=True)


def test_the_budget_of_adalora_falls_with_the_cube_of_time() -> None:
    config = validate(AdapterConfig, {"kind": "adalora", "rank": 8, "warmup_steps": 2, "budget_steps": 6})
    assert [budget(step, config) for step in (1, 2, 4, 6, 9)] == [8, 8, 4 + 4 / 8, 4, 4]
    with pytest.raises(ValueError, match=r"adapter.budget_steps = 6 is after the run's last step 5, .*=5 or less"):
        config.check_steps(5)


def test_the_penalty_of_adalora_is_that_of_the_paper() -> None:
    vectors = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    found = penalty(vectors @ vectors.t())
    found.backward()
    with torch.no_grad():
        assert torch.linalg.matrix_norm(vectors @ vectors.t() - torch.eye(3)).square() == pytest.approx(float(found))
        assert torch.allclose(penalty_gradient(vectors, vectors @ vectors.t()), vectors.grad)


def test_adalora_begins_as_the_base_and_merges_into_what_it_computes() -> None:
    base = decoder()
    adapter = {"kind": "adalora", "rank": 3, "target_rank": 2, "budget_steps": 9}
    assert torch.equal(decoder(adapter)(TOKENS, POSITIONS), base(TOKENS, POSITIONS))
    tuned = decoder(adapter, std=0.5)
    tensors = {name: p.detach() for name, p in tuned.named_global_parameters()}
    whole = merged(list(tensors), tensors.__getitem__, validate(AdapterConfig, adapter))
    weights = {name: whole[name]() if name in whole else tensors[name] for name in tensors if not is_adapter(name)}
    logits = build_single(tuned.model_config, weights)(TOKENS, POSITIONS)
    assert torch.allclose(tuned(TOKENS, POSITIONS), logits, atol=1e-5)
    assert not torch.allclose(base(TOKENS, POSITIONS), logits, atol=1e-3)


@pytest.mark.parametrize(
    ("adapter", "sections", "said"),
    [
        ({"base": "nf4"}, {"train": {"compile": True}}, "set train.compile=false"),
        ({"kind": "prefix"}, {"parallel": {"cp": 2}}, "set parallel.cp=1"),
        ({"kind": "prompt"}, {"parallel": {"tp": 2, "sp": True}}, "set parallel.sp=false"),
        ({"kind": "adalora", "budget_steps": 8}, {}, "set adapter.budget_steps=6 or less"),
    ],
)
def test_a_run_that_an_adapter_does_not_fit_is_refused(
    adapter: dict[str, Any], sections: dict[str, dict[str, Any]], said: str
) -> None:
    tree: dict[str, Any] = {
        "run": {"dir": "runs/x"},
        "train": {"steps": 6, "global_batch_size": 2, "micro_batch_size": 1, "seq_length": 8},
        "optimizer": {"lr": 1e-3},
    }
    whole = {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}}
    validate(TrainerConfig, whole)
    with pytest.raises(ConfigError, match=said):
        validate(TrainerConfig, {**whole, "adapter": adapter})
