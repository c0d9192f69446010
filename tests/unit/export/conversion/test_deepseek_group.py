"""Models of DeepSeek-V2 and V3 and Kimi-K2 that transformers makes are imported and exported with everything equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel

from configs.loader import ConfigError, validate
from configs.model import ModelConfig
from configs.model_parts import HeadConfig
from export import huggingface
from export.conversion.family_registry import differences, family_of
from export.conversion.tensor_shapes import parameters
from export.conversion.walk import ConversionError
from export.hf_config import from_hf_config, to_hf_config
from export.hf_writer import without_modules
from export.import_hf import import_directory
from export.model_source import open_source
from pretrain.model import build_single
from tests.tiny_models import make_source, random_weights
from tests.unit.export.conversion.parity import (
    LENGTH,
    TOKENS,
    check_both_ways,
    check_greedy,
    export_again,
    exported_logits,
    loss_of_modules,
    random_model,
)

SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64},
    **{"kv_lora_rank": 10, "q_lora_rank": 14, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5},
    **{"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 2},
    **{"first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
}
# Published models are trained on 4096 tokens, and contexts extended by 40 (V3) and 32 (Kimi-K2); here from 8 tokens.
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


def with_modules(folder: Path, model: Any, count: int = 1) -> dict[str, torch.Tensor]:
    """Saves a model with random modules of multi-token prediction after its last layer; returns their tensors.

    The index is not 61. Like DeepSeek's files, these have copies of embedding and head, which the modules share.
    """
    model.save_pretrained(folder)
    file, last = folder / "model.safetensors", model.config.num_hidden_layers - 1
    whole, extra = load_file(file), {}
    for layer in range(last + 1, last + 1 + count):
        block = {name: tensor for name, tensor in whole.items() if f"layers.{last}." in name}
        hidden = model.config.hidden_size
        extra |= {name.replace(f".{last}.", f".{layer}.", 1): torch.randn(x.shape) * 0.2 for name, x in block.items()}
        extra |= {
            f"model.layers.{layer}.{name}.weight": torch.rand(hidden) + 0.5
            for name in ("enorm", "hnorm", "shared_head.norm")
        }
        extra[f"model.layers.{layer}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden) * 0.2
        extra[f"model.layers.{layer}.embed_tokens.weight"] = whole["model.embed_tokens.weight"].clone()
        extra[f"model.layers.{layer}.shared_head.head.weight"] = whole["lm_head.weight"].clone()
    save_file(whole | extra, file, {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": count}))
    return extra


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_modules_of_multi_token_prediction_are_those_of_transformers(tmp_path, kind):
    """Compares with transformers, which reads the same files and predicts from them, text by text."""
    latent = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    sizes = {key: size for key, size in (SIZES | GROUPS).items() if kind == "deepseek_v3" or key not in latent}
    sizes |= {} if kind == "deepseek_v3" else {"head_dim": 12, "num_key_value_heads": 2, "pad_token_id": None}
    model = random_model(kind, **sizes, num_mtp_layers=1)
    with_modules(tmp_path / "hf", model)
    import_directory(tmp_path / "hf", tmp_path / "ours")
    source = open_source(tmp_path / "ours")
    assert source.model.head.mtp_depth == 1
    main = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, local_files_only=True).eval()
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3.*"]  # where it looks for modules; else at 61
    modules = MtpModel.from_pretrained(main).float().eval()
    tokens = TOKENS[:1]
    with torch.no_grad():
        hidden = main(tokens, output_hidden_states=True).hidden_states[-1]
        module, positions = modules.layers[0], torch.arange(tokens.shape[1] - 1)[None]
        embedded = main.get_input_embeddings()(tokens[:, 1:])
        rope = modules.rotary_emb(embedded, position_ids=positions)
        causal = torch.full((1, 1, tokens.shape[1] - 1, tokens.shape[1] - 1), float("-inf")).triu(1)
        logits = main.lm_head(
            module(
                inputs_embeds=embedded,
                previous_hidden_state=hidden[:, :-1],
                position_embeddings=rope,
                attention_mask=causal,
                position_ids=positions,
                past_key_values=None,
            )
        )
        theirs = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 2:])
    assert loss_of_modules(source, tokens) == pytest.approx([float(theirs)], rel=1e-4)


def test_modules_of_multi_token_prediction_come_back_from_an_export_bit_for_bit(tmp_path):
    extra = with_modules(tmp_path / "hf", random_model("deepseek_v3", **SIZES | GROUPS), count=2)
    said = import_directory(tmp_path / "hf", tmp_path / "ours")
    assert "4 tensors of layers.3, layers.4, which are not used, and are kept for an export" in said  # the copies
    source = open_source(tmp_path / "ours")
    assert source.model.head.mtp_depth == 2
    written = export_again(source, tmp_path / "back")
    assert all(torch.equal(written.read(name), tensor) for name, tensor in extra.items())
    raw = json.loads((tmp_path / "back/config.json").read_text())
    assert raw["num_nextn_predict_layers"] == 2
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
    for depth in (0, 1):  # a model that was trained with fewer modules, or none
        fewer = source.model.model_copy(update={"head": source.model.head.model_copy(update={"mtp_depth": depth})})
        assert to_hf_config(fewer, 64, "float32", 0, 1, None)["num_nextn_predict_layers"] == depth


def test_a_module_whose_tensors_are_wrong_is_refused(tmp_path):
    extra = with_modules(tmp_path / "hf", random_model("deepseek_v3", **SIZES | GROUPS))
    file = tmp_path / "hf/model.safetensors"
    whole = load_file(file)

    def refused(tensors: dict[str, torch.Tensor], said: str) -> None:
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ConversionError, match=said):
            import_directory(tmp_path / "hf", tmp_path / "ours")

    lost = "model.layers.3.eh_proj.weight"
    refused({name: x for name, x in whole.items() if name != lost}, rf"1 tensor is missing.*{lost}")
    copy = "model.layers.3.shared_head.head.weight"
    refused(whole | {copy: extra[copy] + 1}, rf"{copy} differs from lm_head\.weight.*remove all tensors of layers\.3")


def test_a_family_that_cannot_hold_modules_is_exported_without_them():
    raw = {"model_type": "llama", "vocab_size": 96, "hidden_size": 40, "intermediate_size": 44, "num_hidden_layers": 2}
    plain = from_hf_config(raw | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10})
    ours = plain.model_copy(update={"head": HeadConfig(mtp_depth=1)})
    assert family_of(ours).model_type == "llama"
    with make_source(ours, random_weights(ours), Path("no tokenizer")).weights() as weights:
        alone, kept = without_modules(ours, weights)
    assert alone == plain and kept.shapes.keys() == parameters(plain).keys() != weights.shapes.keys()


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
