"""DeepSeek-V2 and V3 and Kimi-K2: models that transformers makes, in and out, with everything equal."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from export import huggingface
from export.conversion.registry import differences, family_of
from export.conversion.walk import ConversionError
from export.hf_config import from_hf_config, to_hf_config
from export.import_hf import import_directory
from export.model_source import open_source
from pretrain.model import build_single
from tests.unit.export.conftest import random_weights
from tests.unit.export.conversion.parity import (
    LENGTH,
    TOKENS,
    check_both_ways,
    check_greedy,
    export_again,
    exported_logits,
    random_model,
)

SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64},
    **{"kv_lora_rank": 10, "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5},
    **{"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 2},
    **{"first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
}
# Published models are trained on 4096 tokens and stretched by 40 (V3) and 32 (Kimi-K2); here from 8 tokens on.
YARN = {
    **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 8},
    **{"beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.9},
}
GROUPS = {"n_group": 3, "topk_group": 2}


@pytest.mark.parametrize(
    "keys",
    [
        {"topk_method": "greedy"},
        {"topk_method": "group_limited_greedy", **GROUPS, "rope_parameters": YARN},
        {"topk_method": "greedy", "q_lora_rank": None, "v_head_dim": 17, "first_k_dense_replace": 2},
    ],
    ids=["greedy", "groups and yarn", "queries whole, wide values"],
)
def test_deepseek_v2(tmp_path, keys):
    model = random_model("deepseek_v2", **SIZES | keys)
    source = check_both_ways(tmp_path, model)
    assert [layer.moe is not None for layer in source.model.layers][:2] == [False, keys.get("q_lora_rank", 1) == 1]
    check_greedy(model, source)


@pytest.mark.parametrize(
    "keys",
    [
        {**GROUPS, "norm_topk_prob": False},
        {**GROUPS, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        {"n_group": 1, "topk_group": 1, "rope_parameters": YARN | {"beta_fast": 1.0, "rope_theta": 50000.0}},
        {**GROUPS, "rope_interleave": False, "q_lora_rank": None},
    ],
    ids=["groups", "yarn", "Kimi-K2", "halves"],
)
def test_deepseek_v3(tmp_path, keys):
    model = random_model("deepseek_v3", **SIZES | keys)
    source = check_both_ways(tmp_path, model)
    check_greedy(model, source)


def test_the_choosing_bias_stays_fp32_in_bf16_files(tmp_path):
    model = random_model("deepseek_v3", torch.bfloat16, **SIZES | GROUPS)
    for layer in (1, 2):
        gate = model.model.layers[layer].mlp.gate
        gate.e_score_correction_bias = torch.randn(6)  # transformers loads it so, and published files have it so
    bias = gate.e_score_correction_bias.clone()
    source = check_both_ways(tmp_path, model)
    name = "layers.2.moe.balance.bias"
    decoder = build_single(source.model, source.read())
    assert torch.equal(decoder.named_balance()[name], bias) and not torch.equal(bias, bias.bfloat16().float())


def test_the_choosing_bias_changes_choices_and_no_weights():
    """Compares with the router of the paper (DeepSeek-V3, eq. 12 to 16), written out."""
    config = from_hf_config(v3_config())
    decoder = build_single(config, random_weights(config))
    moe = decoder.layers["1"].moe
    x = torch.randn(50, config.hidden_size, generator=torch.Generator().manual_seed(0))
    weights, chosen, logits = moe.router(x, moe.balance.choosing_bias)
    scores = logits.sigmoid()
    by_group = (scores + moe.balance.bias).unflatten(1, (3, 2))
    allowed = by_group.sum(-1).topk(2).indices  # the best two of a group are all that it has
    masked = torch.full_like(by_group, float("-inf"))
    for token, groups in enumerate(allowed):
        masked[token, groups] = by_group[token, groups]
    expected = masked.flatten(1).topk(2).indices
    assert torch.equal(chosen.sort().values, expected.sort().values)
    own = scores.gather(1, chosen)
    torch.testing.assert_close(weights, own / own.sum(-1, keepdim=True) * 1.5)
    without, _, _ = moe.router(x, torch.zeros_like(moe.balance.bias))
    assert not torch.allclose(without.sort().values, weights.sort().values)


def v3_config(**keys: Any) -> dict[str, Any]:
    return {"model_type": "deepseek_v3", **SIZES, **GROUPS, **keys}


def test_layers_of_multi_token_prediction_are_kept_and_said(tmp_path):
    """Adds a layer after the last one, at an index that is not 61, and gets it back from an export."""
    model = random_model("deepseek_v3", **SIZES | GROUPS, num_mtp_layers=1)
    model.save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf/model.safetensors"
    extra = {f"model.layers.3.{name}.weight": torch.randn(40) for name in ("enorm", "hnorm", "shared_head.norm")}
    extra["model.layers.3.eh_proj.weight"] = torch.randn(40, 80)
    save_file(load_file(file) | extra, file)
    said = import_directory(tmp_path / "hf", tmp_path / "ours")
    assert "4 tensors of layers.3, which are not used, and are kept for an export" in said
    source = open_source(tmp_path / "ours")
    written = export_again(source, tmp_path / "back")
    assert all(torch.equal(written.read(name), tensor) for name, tensor in extra.items())
    raw = json.loads((tmp_path / "back/config.json").read_text())
    assert raw["num_nextn_predict_layers"] == 1
    # The command, which verifies what it wrote with and without the last layer, publishes them too.
    for layers in (3, 2):
        (tmp_path / "export.toml").write_text(f'run = "{tmp_path / "ours"}"\nout = "{tmp_path / f"out{layers}"}"\n')
        keys = ["verify.greedy_tokens=8", f"verify.layers={layers}"]
        assert huggingface.main([str(tmp_path / "export.toml"), *keys]) == 0
        assert extra.keys() <= load_file(tmp_path / f"out{layers}/model.safetensors").keys()
    with pytest.raises(ConfigError, match=r"verify\.layers = 1 .* set verify\.layers=2"):
        huggingface.main(
            [str(tmp_path / "export.toml"), "verify.layers=1", "verify.greedy_tokens=8", f"out={tmp_path / 'out1'}"]
        )
    assert to_hf_config(source.model, 64, "float32", 0, 1, None)["num_nextn_predict_layers"] == 0


def test_a_config_that_counts_too_few_layers_is_refused(tmp_path):
    random_model("deepseek_v3", **SIZES | GROUPS).save_pretrained(tmp_path / "hf")
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(raw | {"num_hidden_layers": 2}))
    with pytest.raises(ConversionError, match=r"tensors are not part of DeepseekV3ForCausalLM: model\.layers\.2\."):
        import_directory(tmp_path / "hf", tmp_path / "ours")


def test_published_configs_are_read():
    """Reads what DeepSeek-V3's and Kimi-K2's config.json say as they were written by version 4, without weights."""
    scaling = {
        **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
        **{"original_max_position_embeddings": 4096, "type": "yarn"},
    }
    common = {
        **{"hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512},
        **{"moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_shared_experts": 1, "norm_topk_prob": True},
        **{"num_experts_per_tok": 8, "num_hidden_layers": 61, "q_lora_rank": 1536, "qk_nope_head_dim": 128},
        **{"qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        **{"v_head_dim": 128, "attention_bias": False, "ep_size": 1, "tie_word_embeddings": False},
    }
    v3 = from_hf_config(
        {
            **{"model_type": "deepseek_v3", **common, "vocab_size": 129280, "first_k_dense_replace": 3},
            **{"n_group": 8, "topk_group": 4, "n_routed_experts": 256, "num_attention_heads": 128},
            **{"num_key_value_heads": 128, "routed_scaling_factor": 2.5, "rope_theta": 10000},
            **{"max_position_embeddings": 163840, "num_nextn_predict_layers": 1, "rope_scaling": scaling},
        }
    )
    kimi = from_hf_config(
        {
            **{"model_type": "kimi_k2", **common, "vocab_size": 163840, "first_k_dense_replace": 1},
            **{"n_group": 1, "topk_group": 1, "n_routed_experts": 384, "num_attention_heads": 64},
            **{"num_key_value_heads": 64, "routed_scaling_factor": 2.827, "rope_theta": 50000.0},
            **{"max_position_embeddings": 131072, "num_nextn_predict_layers": 0},
            "rope_scaling": scaling | {"beta_fast": 1.0, "factor": 32.0},
        }
    )
    assert (v3.num_parameters(), kimi.num_parameters()) == (671_026_404_352, 1_026_408_209_408)
    for model in (v3, kimi):
        family = family_of(model)
        assert (family.model_type, differences(model, family)) == ("deepseek_v3", {})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"attention_bias": True}, "attention_bias = True is not supported in DeepseekV3ForCausalLM; expected False"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy' is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
        ({"n_shared_experts": 0}, "n_shared_experts = 0 is not supported.* expected a whole number from 1 on"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace = 3 is not supported.* below num_hidden_layers = 3"),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0, "mscale_all_dim": 1.0}},
            "mscale_all_dim = 1.0 is not supported.* expected none where rope_type is not 'yarn'",
        ),
        ({"num_key_value_heads": 2}, "num_kv_heads = 2, and latent attention makes keys and values for every head"),
    ],
)
def test_what_cannot_be_computed_is_refused(keys, said):
    with pytest.raises(ConversionError, match=said):
        from_hf_config(v3_config(**keys))


def test_v2_refuses_weights_divided_by_their_sum_which_transformers_does_not_compute():
    config = {"model_type": "deepseek_v2", **SIZES, "topk_method": "group_limited_greedy"}
    with pytest.raises(ConversionError) as raised:
        from_hf_config(config | {"norm_topk_prob": True})
    for said in ("norm_topk_prob = True is not supported", "n_group is missing", "topk_group is missing"):
        assert said in str(raised.value)


def test_halves_of_our_own_are_exported_as_the_pairs_of_v2(tmp_path):
    raw = {"model_type": "deepseek_v2", **SIZES, "topk_method": "greedy", "q_lora_rank": None}
    config = from_hf_config(raw).model_dump(mode="json", exclude_none=True)
    config["position"]["layout"] = "halves"
    ours = validate(ModelConfig, config)
    weights = random_weights(ours)
    with torch.no_grad():
        logits = build_single(ours, weights)(TOKENS, torch.arange(LENGTH)[None].expand_as(TOKENS))
    assert (logits - exported_logits(ours, weights, tmp_path / "hf")).abs().max() < 1e-4


def test_the_cache_holds_latent_vectors_alone():
    config = from_hf_config(v3_config())
    cache = build_single(config, random_weights(config)).new_cache(2, 16)
    assert cache.store.shape == (3, 1, 2, 1, 16, 10 + 8)  # and not twice 4 heads of 14
