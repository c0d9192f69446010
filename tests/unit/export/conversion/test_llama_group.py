"""Models of LLaMA, Mistral, Mixtral and Qwen that transformers makes are imported and exported, all being equal."""

import pytest
import torch

from configs.loader import validate
from configs.model import ModelConfig
from pretrain.model import build_single
from tests.tiny_models import random_weights
from tests.unit.export.conversion.parity import LENGTH, TOKENS, check_both_ways, exported_logits, random_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "llama3": {
        **{"factor": 8.0, "low_freq_factor": 1.5, "high_freq_factor": 3.0},
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 2.0},
    "longrope": {
        **{"factor": 4.0, "original_max_position_embeddings": 16},
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
}


@pytest.mark.parametrize(
    "keys",
    [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 12}],
    ids=["plain", "tied", "biases", "head_dim"],
)
def test_llama(tmp_path, keys):
    check_both_ways(tmp_path, random_model("llama", **SIZES, **keys))


@pytest.mark.parametrize("kind", ROPES)
def test_llama_with_scaled_positions_beyond_those_it_was_first_trained_on(tmp_path, kind):
    # transformers takes max_position_embeddings for the length from which a dynamic scaling starts.
    longest = {"max_position_embeddings": 16 if kind == "dynamic" else 64}
    rope = {"rope_type": kind, "rope_theta": 500.0, **ROPES[kind]}
    source = check_both_ways(tmp_path, random_model("llama", **SIZES | longest, rope_parameters=rope))
    scaling = source.model.position.scaling
    assert scaling is not None
    assert (scaling.kind, source.model.position.theta, scaling.factor) == (kind, 500.0, ROPES[kind]["factor"])
    assert LENGTH > 16  # otherwise no position would be far


def test_bf16_files_stay_bf16(tmp_path):
    check_both_ways(tmp_path, random_model("llama", torch.bfloat16, **SIZES))


@pytest.mark.parametrize("window", [8, None])
def test_mistral(tmp_path, window):
    source = check_both_ways(tmp_path, random_model("mistral", **SIZES, sliding_window=window))
    assert source.model.attention.window == window
    assert source.architecture == "MistralForCausalLM"


def test_mixtral(tmp_path):
    check_both_ways(tmp_path, random_model("mixtral", **SIZES, num_local_experts=6, num_experts_per_tok=2))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ],
    ids=["full", "windows"],
)
def test_qwen2(tmp_path, keys):
    source = check_both_ways(tmp_path, random_model("qwen2", **SIZES | keys))
    windows = [layer.attention.window for layer in source.model.layers]
    assert windows == ([None, 8, 8] if keys else [None, None])


@pytest.mark.parametrize(
    "keys",
    [{}, {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [1], "norm_topk_prob": True}],
    ids=["every layer", "some layers"],
)
def test_qwen2_moe(tmp_path, keys):
    model = random_model("qwen2_moe", **SIZES | QWEN_MOE | keys, shared_expert_intermediate_size=40)
    source = check_both_ways(tmp_path, model)
    assert [layer.moe is not None for layer in source.model.layers] == (
        [False, False, False, True, False] if keys else [True, True]
    )


@pytest.mark.parametrize("keys", [{"head_dim": 12}, {"head_dim": 8, "attention_bias": True}], ids=["wide", "biases"])
def test_qwen3(tmp_path, keys):
    check_both_ways(tmp_path, random_model("qwen3", **SIZES, **keys))


def test_qwen3_moe(tmp_path):
    model = random_model("qwen3_moe", **SIZES | QWEN_MOE, head_dim=12, norm_topk_prob=True, mlp_only_layers=[0])
    source = check_both_ways(tmp_path, model)
    assert [layer.moe is not None for layer in source.model.layers] == [False, True]


@pytest.mark.parametrize("more", [{}, {"attention": {"qk_norm": "head"}, "head_dim": 12}], ids=["LLaMA", "Qwen3"])
def test_rotary_pairs_are_exported_as_the_halves_that_transformers_rotates(tmp_path, more):
    sizes = {"vocab_size": 96, "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 56, "num_heads": 4}
    config = validate(ModelConfig, {**sizes, "num_kv_heads": 2, "position": {"layout": "pairs"}, **more})
    weights = random_weights(config)
    with torch.no_grad():
        ours = build_single(config, weights)(TOKENS, torch.arange(LENGTH)[None].expand_as(TOKENS))
    assert (ours - exported_logits(config, weights, tmp_path / "hf")).abs().max() < 1e-4
