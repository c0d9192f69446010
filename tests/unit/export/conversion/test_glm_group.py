"""Models of GLM, GLM-4-0414 and GLM-4.5 that transformers makes are imported and exported with everything equal."""

from typing import Any

import pytest
import torch

from configs.loader import validate
from configs.model import ModelConfig
from export.conversion.walk import ConversionError
from export.hf_config import from_hf_config, to_hf_config
from pretrain.model import build_single
from tests.tiny_models import random_weights
from tests.unit.export.conversion.parity import (
    LENGTH,
    TOKENS,
    check_both_ways,
    check_greedy,
    exported_logits,
    random_model,
)

SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64},
    "pad_token_id": None,
}
MOE = {
    **{"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 2},
    **{"first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
}


@pytest.mark.parametrize("kind", ["glm", "glm4"])
@pytest.mark.parametrize(
    "keys",
    [{}, {"attention_bias": False, "tie_word_embeddings": True, "partial_rotary_factor": 1.0}],
    ids=["biases", "whole heads"],
)
def test_glm(tmp_path, kind, keys):
    model = random_model(kind, **SIZES | keys)
    source = check_both_ways(tmp_path, model)
    assert source.model.position.fraction == keys.get("partial_rotary_factor", 0.5)
    assert source.model.residual.kind == ("sandwich" if kind == "glm4" else "pre")
    check_greedy(model, source)


@pytest.mark.parametrize(
    "keys",
    [{"use_qk_norm": True, "attention_bias": True}, {"n_group": 3, "topk_group": 2, "norm_topk_prob": False}],
    ids=["norms and biases", "groups"],
)
def test_glm_4_5(tmp_path, keys):
    model = random_model("glm4_moe", **SIZES | MOE | keys)
    source = check_both_ways(tmp_path, model)
    assert [layer.moe is not None for layer in source.model.layers] == [False, True]
    check_greedy(model, source)


@pytest.mark.parametrize("kind", ["glm", "glm4", "glm4_moe"])
def test_half_of_each_head_is_rotated_where_the_key_is_absent(kind):
    raw = {"model_type": kind, **SIZES, **MOE}
    assert from_hf_config(raw).position.fraction == 0.5
    stated = from_hf_config(raw | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}})
    assert stated.position.fraction == 1.0
    written = to_hf_config(from_hf_config(raw), 64, "float32", None, None, None)
    assert written["partial_rotary_factor"] == written["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert from_hf_config(raw).norm.eps == (1e-5 if kind == "glm4_moe" else 1.5625e-07)


def test_halves_of_our_own_are_exported_as_the_pairs_of_glm(tmp_path):
    raw = from_hf_config({"model_type": "glm", **SIZES}).model_dump(mode="json", exclude_none=True)
    raw["position"]["layout"] = "halves"
    ours = validate(ModelConfig, raw)
    weights = random_weights(ours)
    with torch.no_grad():
        logits = build_single(ours, weights)(TOKENS, torch.arange(LENGTH)[None].expand_as(TOKENS))
    assert (logits - exported_logits(ours, weights, tmp_path / "hf")).abs().max() < 1e-4


def test_a_fraction_that_rotates_an_odd_number_of_elements_is_refused():
    with pytest.raises(ConversionError, match=r"position\.fraction = 0\.25 rotates 3 of 12 elements"):
        from_hf_config({"model_type": "glm", **SIZES, "partial_rotary_factor": 0.25})
