"""Models of Gemma 2 and 3, OLMo 2 and 3, Phi-3 and gpt-oss are imported and exported with everything equal.

Rows are five windows long, and longer than the context that scalings start from.
"""

from typing import Any

import pytest

from configs.loader import validate
from configs.model import ModelConfig
from export.conversion.family_registry import family_of
from export.conversion.walk import ConversionError
from export.hf_config import from_hf_config, to_hf_config
from tests.unit.export.conversion.parity import LENGTH, check_both_ways, check_greedy, random_model

SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None},
}
GEMMA = {**SIZES, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 20}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
LONGROPE = {
    **{"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 4.0},
    **{"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0]},
}


def test_gemma_2(tmp_path):
    model = random_model("gemma2", **GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
    source = check_both_ways(tmp_path, model)
    assert [layer.attention.pattern for layer in source.model.layers] == ["sliding", "causal", "sliding"]
    assert (source.model.attention.softcap, source.model.head.softcap) == (5.0, 3.0)
    assert source.model.tie_embeddings
    assert LENGTH >= 5 * 8
    check_greedy(model, source)


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 8.0}], ids=str)
def test_gemma_3_has_two_bases_and_scales_the_global_one(tmp_path, scaling):
    ropes = {
        "full_attention": {"rope_theta": 700.0, **scaling},
        "sliding_attention": {"rope_theta": 50.0, "rope_type": "default"},
    }
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    model = random_model("gemma3_text", **GEMMA, rope_parameters=ropes, layer_types=kinds)
    source = check_both_ways(tmp_path, model)
    assert [layer.position.theta for layer in source.model.layers] == [50.0, 50.0, 700.0]
    assert [layer.position.scaling is not None for layer in source.model.layers] == [False, False, "factor" in scaling]
    check_greedy(model, source)


def test_gemma_3_of_version_4_has_its_bases_in_keys_of_their_own():
    raw = {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 7, "sliding_window_pattern": 3}
    model = from_hf_config(raw | {"rope_theta": 5e5, "rope_local_base_freq": 2e4})
    assert [layer.position.theta for layer in model.layers] == [2e4, 2e4, 5e5, 2e4, 2e4, 5e5, 2e4]
    written = to_hf_config(model, 64, "float32", None, None, None)
    assert (written["rope_theta"], written["rope_local_base_freq"], written["query_pre_attn_scalar"]) == (5e5, 2e4, 20)


def test_a_soft_cap_of_scores_which_gemma_3_s_class_does_not_compute_is_refused():
    with pytest.raises(ConversionError, match=r"attn_logit_softcapping = 5\.0 is not supported in Gemma3ForCausalLM"):
        from_hf_config({"model_type": "gemma3_text", **GEMMA, "attn_logit_softcapping": 5.0})
    raw = from_hf_config({"model_type": "gemma3_text", **GEMMA}).model_dump(mode="json", exclude_none=True)
    raw["attention"]["softcap"] = 5.0
    with pytest.raises(ValueError, match=r"Gemma3ForCausalLM, .* has model\.attention\.softcap = None, not 5\.0"):
        family_of(validate(ModelConfig, raw))


@pytest.mark.parametrize("keys", [{"head_dim": 14}, {"attention_bias": True}], ids=["wide heads", "biases"])
def test_olmo_2(tmp_path, keys):
    model = random_model("olmo2", **SIZES | keys)
    source = check_both_ways(tmp_path, model)
    if "head_dim" in keys:  # with such biases the random model writes few different tokens
        check_greedy(model, source)


def test_olmo_3_scales_positions_in_layers_without_a_window_alone(tmp_path):
    ropes = {"full_attention": {"rope_theta": 900.0, **YARN}}
    ropes["sliding_attention"] = {"rope_theta": 900.0, "rope_type": "default"}
    keys = {"sliding_window": 8, "num_hidden_layers": 4, "rope_parameters": ropes}
    model = random_model("olmo3", **SIZES | keys)
    source = check_both_ways(tmp_path, model)
    assert [layer.position.scaling is not None for layer in source.model.layers] == [False, False, False, True]
    check_greedy(model, source)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"sliding_window": 8, "num_key_value_heads": 4, "head_dim": 14},
        {"rope_parameters": {**LONGROPE, "rope_theta": 900.0}, "original_max_position_embeddings": 16},
    ],
    ids=["plain", "window", "longrope"],
)
def test_phi_3(tmp_path, keys):
    source = check_both_ways(tmp_path, random_model("phi3", **SIZES | keys))
    scaling = source.model.position.scaling
    assert (scaling.kind if scaling else None) == ("longrope" if "rope_parameters" in keys else None)


def test_gpt_oss(tmp_path):
    keys = {"head_dim": 12, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8}
    model = random_model("gpt_oss", **SIZES | keys, rope_parameters={**YARN, "rope_theta": 900.0})
    source = check_both_ways(tmp_path, model)
    assert [layer.attention.pattern for layer in source.model.layers] == ["sliding", "causal", "sliding"]
    check_greedy(model, source)


def test_gpt_oss_is_scaled_where_config_json_says_nothing():
    model = from_hf_config({"model_type": "gpt_oss", **SIZES, "head_dim": 12})
    scaling = model.position.scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_length, scaling.truncate) == ("yarn", 32.0, 4096, False)
    assert model.position.theta == 150000.0


@pytest.mark.parametrize(
    ("family", "wrong", "said", "right"),
    [
        *(
            (family, {"rope_parameters": [1]}, "expected a section for each type of layer", {"rope_parameters": ropes})
            for ropes in [{name: {"rope_theta": 900.0} for name in ("full_attention", "sliding_attention")}]
            for family in ("gemma3_text", "olmo3")
        ),
        (
            "gpt_oss",
            {"sliding_window": None},
            "expected a number of tokens, as layer_types has 'sliding_attention'",
            {"sliding_window": 8},
        ),
    ],
)
def test_a_config_is_read_once_a_key_has_what_is_expected(family, wrong, said, right):
    with pytest.raises(ConversionError, match=said):
        from_hf_config({"model_type": family, **GEMMA, **wrong})
    assert from_hf_config({"model_type": family, **GEMMA, **right}).num_layers == 3
