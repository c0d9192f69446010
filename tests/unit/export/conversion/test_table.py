"""Families' tables against facts: names, shapes and config.json that transformers writes for a tiny model of each."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from configs.loader import validate
from configs.model import ModelConfig
from export.conversion.family_registry import FAMILIES, computation, differences, family_of, family_of_config
from export.conversion.table import longest_row
from export.conversion.tensor_shapes import parameters
from export.conversion.walk import ConversionError, entries
from export.hf_config import from_hf_config, to_hf_config
from pretrain.model import Decoder

FACTS = Path(__file__).parent / "hf_names"
TYPES = {name for family in FAMILIES for name in (family.model_type, *family.other_types)}
SIZES = {"vocab_size": 96, "num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 48, "num_heads": 4, "num_kv_heads": 2}
LATENT = {"kv_rank": 8, "nope_head_dim": 8, "rope_head_dim": 4, "v_head_dim": 6}


def facts(name: str) -> dict[str, Any]:
    return json.loads((FACTS / f"{name}.json").read_text())


KNOWN = [file.stem for file in sorted(FACTS.glob("*.json")) if facts(file.stem)["config"]["model_type"] in TYPES]


@pytest.mark.parametrize("name", KNOWN)
def test_names_and_shapes_are_those_that_transformers_writes(name):
    known = facts(name)
    family = family_of_config(known["config"])
    model = from_hf_config(known["config"])
    theirs = {name: shape for entry in entries(family, model) for name, shape in entry.theirs.items()}
    listed = {name: shape for name, shape in theirs.items() if not re.search(r"\.experts\.[1-9]", name)}
    wanted = {
        name: tuple(shape)
        for name, (shape, _) in known["tensors"].items()
        if not any(re.fullmatch(pattern, name) for pattern in (*family.ignored, *family.kept))
    }
    assert listed == wanted  # of single experts the facts list the first


@pytest.mark.parametrize(
    ("scaling", "stated"),
    [
        ({"kind": "yarn", "factor": 2.0, "original_length": 32}, 76),
        ({"kind": "dynamic", "factor": 2.0, "original_length": 32}, 32),
        ({"kind": "longrope", "factor": 2.0, "original_length": 32, "short_factor": [1.0] * 4}, 64),
        ({"kind": "longrope", "attention_factor": 1.2, "original_length": 32, "short_factor": [1.0] * 4}, 76),
    ],
)
def test_a_context_from_which_readers_compute_scaling_is_the_one_that_it_was_made_for(
    scaling: dict[str, Any], stated: int
) -> None:
    """The model has been trained on texts of 76 tokens."""
    if scaling["kind"] == "longrope":
        scaling |= {"long_factor": [2.0] * 4}
    model = validate(ModelConfig, SIZES | {"position": {"scaling": scaling}})
    assert longest_row(model, 76) == stated


@pytest.mark.parametrize("name", KNOWN)
def test_config_is_read_and_written_as_transformers_reads_it(name):
    raw = facts(name)["config"]
    family, model = family_of_config(raw), from_hf_config(raw)
    assert not differences(model, family)
    stated = family.longest_row(raw)
    written = to_hf_config(
        model, stated, "float32", raw.get("bos_token_id"), raw.get("eos_token_id"), raw.get("pad_token_id"),
        family.architecture,
    )  # fmt: skip
    assert from_hf_config(written) == model
    before, after = (AutoConfig.for_model(**config).to_dict() for config in (raw, written))
    changes_nothing = {"rope_theta", "rope_scaling", "max_window_layers", "layer_types", "dtype", "torch_dtype"}
    same = {key for key in before if before[key] == after.get(key)}
    assert before.keys() - same <= changes_nothing | {"sliding_window", "head_dim"} | set(family.kept_keys)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_every_family_has_facts_and_is_found_by_its_class_too(family):
    assert family.model_type in {facts(name)["config"]["model_type"] for name in KNOWN}
    assert family_of_config({"architectures": [family.architecture]}) is family


DECODERS: dict[str, dict[str, Any]] = {
    "tied": {"tie_embeddings": True},
    "biases": {"attention": {"qkv_bias": True, "output_bias": True, "qk_norm": "head"}, "mlp": {"bias": True}},
    "experts": {
        "moe": {
            **{"num_experts": 4, "num_shared_experts": 1, "shared_gate": True, "shared_ffn_hidden_size": 24},
            **{"first_layer": 1, "bias_update_rate": 0.1, "router_bias": True},
        }
    },
    "expert biases": {
        "moe": {"num_experts": 4},
        "mlp": {"kind": "clamped_swiglu", "bias": True},
        "attention": {"sinks": True, "qk_norm": "projection"},
    },
    "learned": {
        **{"norm": {"kind": "layer", "embedding": True}, "residual": {"kind": "post"}},
        **{"position": {"kind": "learned", "max_positions": 64}, "mlp": {"kind": "relu", "bias": True}},
    },
    "sandwich": {"residual": {"kind": "sandwich"}},
    "outputs": {"residual": {"kind": "outputs"}},
    "parallel": {"residual": {"kind": "parallel"}, "norm": {"kind": "layer"}},
    "latent": {"num_kv_heads": 4, "attention": {"latent": {**LATENT, "q_rank": 12}}},
    "scalar": {"head": {"kind": "scalar", "outputs": 3}},
    "delta": {
        "attention": {
            **{"delta": {"num_key_heads": 2, "num_value_heads": 6, "key_head_dim": 5, "value_head_dim": 7}},
            **{"output_gate": True, "qkv_bias": True},
        },
        **{"layer_pattern": ["linear", "full"], "kinds": {"linear": {}, "full": {"delta": False}}},
    },
    "latent, queries whole": {"num_kv_heads": 4, "attention": {"latent": LATENT}},
}


@pytest.mark.parametrize("case", DECODERS)
def test_names_and_shapes_of_the_decoder_follow_from_its_config(case):
    config = validate(ModelConfig, SIZES | DECODERS[case])
    decoder = Decoder(config)
    tensors = [*decoder.named_global_parameters(), *decoder.named_balance().items()]
    assert parameters(config) == {name: tuple(tensor.shape) for name, tensor in tensors}
    assert sum(parameter.numel() for parameter in decoder.parameters()) == config.num_parameters()


def test_a_family_is_taken_by_what_the_config_says():
    def taken(**more: Any) -> str:
        return family_of(validate(ModelConfig, SIZES | more)).model_type

    assert taken() == "llama"
    assert taken(attention={"qkv_bias": True, "output_bias": True}) == "llama"
    assert taken(attention={"qkv_bias": True}) == "qwen2"
    assert taken(attention={"pattern": "sliding", "window": 7}) == "mistral"
    assert taken(attention={"qk_norm": "head"}) == "qwen3"
    assert taken(moe={"num_experts": 4}) == "mixtral"
    assert taken(moe={"num_experts": 4, "ffn_hidden_size": 24}, attention={"qk_norm": "head"}) == "qwen3_moe"
    shared = {"num_experts": 4, "num_shared_experts": 1, "shared_gate": True, "renormalize": False}
    assert taken(moe=shared, attention={"qkv_bias": True}) == "qwen2_moe"
    mistral = family_of(validate(ModelConfig, SIZES), "MistralForCausalLM")
    assert mistral.model_type == "mistral"  # what was imported as Mistral stays so


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"attention": {"sinks": True}}, r"LlamaForCausalLM, .* has model\.attention\.sinks = False, not True; train"),
        ({"moe": {"num_experts": 4, "gating": "sigmoid"}}, r"model\.moe\.gating = 'softmax', not 'sigmoid'"),
        (
            {"moe": {"num_experts": 4, "bias_update_rate": 0.1}},
            r"bias_update_rate = 0\.0, not 'more than 0'",
        ),
        ({"attention": {"softcap": 5.0}, "mlp": {"kind": "relu"}}, r"softcap = None, not 5\.0 and model\.mlp\.kind = "),
        (
            {"moe": {"num_experts": 4, "router_bias": True}, "attention": {"sinks": True}},
            r"MixtralForCausalLM, .* has model\.attention\.sinks = False, not True and model\.moe\.router_bias = ",
        ),
        (
            {"layer_pattern": ["a", "b"], "kinds": {"a": {}, "b": {"position": "none"}}},
            r"model\.position\.kind in layer 1 = 'rotary', not 'none'",
        ),
    ],
)
def test_what_no_family_computes_is_named_with_the_nearest_family(more, said):
    with pytest.raises(ValueError, match=said) as refused:
        family_of(validate(ModelConfig, SIZES | more))
    told = r"has (.+); train a model with (?:that value|those values) to export it$"
    values = re.findall(r"model\.(\w+)\.(\w+) = (.+?), not ", re.findall(told, str(refused.value))[0])
    for section, key, value in values:
        more = more | {section: more[section] | {key: ast.literal_eval(value)}}
    assert "in layer" in said or family_of(validate(ModelConfig, SIZES | more))


def test_a_type_of_model_that_is_read_is_one_that_the_message_names():
    with pytest.raises(ValueError, match=r"config\.json: model_type = 'rwkv' is not supported; supported are ") as told:
        family_of_config({"model_type": "rwkv"})
    for name in str(told.value).rpartition(" are ")[2].split(", "):
        assert family_of_config({"model_type": name}).model_type == name


def test_norms_of_heads_and_of_whole_projections_are_not_the_same():
    config = validate(ModelConfig, SIZES | {"attention": {"qk_norm": "projection"}})
    qwen = next(family for family in FAMILIES if family.model_type == "qwen3")
    assert differences(config, qwen) == {"model.attention.qk_norm": ("'projection'", "'head'")}


def test_the_same_model_in_other_words_is_the_same():
    moe = {"num_experts": 4}
    one = {"moe": {**moe, "first_layer": 1, "top_groups": 1}, "head_dim": 8, "attention": {"scale": 8**-0.5}}
    other = {"moe": {**moe, "dense_layers": [0], "ffn_hidden_size": 48, "aux_loss_coef": 0.5}, "init_std": 0.1}
    first, second = (computation(validate(ModelConfig, SIZES | more)) for more in (one, other))
    assert first == second


def test_tensors_without_a_rule_are_named():
    family = family_of(validate(ModelConfig, SIZES))
    with pytest.raises(ConversionError, match=r"LlamaForCausalLM has no tensor for layers\.0\.attention\.sinks, l"):
        entries(family, validate(ModelConfig, SIZES | {"attention": {"sinks": True}}))


PUBLISHED: dict[str, dict[str, Any]] = {
    # Llama 3.1 8B, written by version 4.
    "llama3": {
        **{"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0},
        **{"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu"},
        **{"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "mlp_bias": False},
        **{"max_position_embeddings": 131072, "model_type": "llama", "num_attention_heads": 32},
        **{"num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05},
        "rope_scaling": {
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
        **{"rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256},
    },
    # LLaMA 1 as first converted: no key-value heads, no rope_theta.
    "llama1": {
        **{"architectures": ["LLaMAForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "vocab_size": 32000},
        **{"initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 2048},
        **{"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-06},
    },
}


def test_published_configs_of_version_4_are_read():
    new = from_hf_config(PUBLISHED["llama3"])
    assert (new.position.theta, new.num_kv_heads, new.norm.eps) == (500000.0, 8, 1e-5)
    assert new.position.scaling is not None
    assert (new.position.scaling.factor, new.position.scaling.original_length) == (8.0, 8192)
    written = to_hf_config(new, 131072, "bfloat16", 1, 2, None)
    assert written["rope_theta"] == 500000.0  # version 4 and vLLM read these two
    assert written["rope_scaling"] == PUBLISHED["llama3"]["rope_scaling"]
    assert written["rope_parameters"] == {**PUBLISHED["llama3"]["rope_scaling"], "rope_theta": 500000.0}
    old = from_hf_config(PUBLISHED["llama1"])
    assert (old.position.theta, old.num_kv_heads, old.num_parameters()) == (10000.0, 32, 6_738_415_616)
    assert sum(torch.Size(shape).numel() for shape in parameters(old).values()) == 6_738_415_616


def test_what_transformers_takes_where_a_key_is_absent():
    def read(name: str, *absent: str, **keys: Any) -> ModelConfig:
        raw = {key: value for key, value in facts(name)["config"].items() if key not in absent}
        return from_hf_config(raw | keys)

    assert read("mistral", "sliding_window").attention.window == 4096
    assert read("mistral", sliding_window=None).attention.window is None
    assert read("qwen3", "head_dim").head_dim == 128
    assert read("llama", "rms_norm_eps").norm.eps == 1e-6
    assert read("mixtral", "rope_parameters", "rms_norm_eps").position.theta == 1e6
    assert not read("qwen3_moe", "norm_topk_prob").layer(0).moe.renormalize
    assert read("qwen2_moe", "qkv_bias").attention.qkv_bias
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "original_max_position_embeddings": 16}
    assert read("llama", rope_parameters=yarn).position.scaling.factor == 4.0  # 64 / 16


def test_experts_are_counted_under_both_names_for_both_versions():
    model = from_hf_config(facts("qwen3_moe")["config"])
    written = to_hf_config(model, 64, "float32", 1, 2, None, "Qwen3MoeForCausalLM")
    assert written["num_experts"] == written["num_local_experts"] == 4
    assert from_hf_config({k: v for k, v in written.items() if k != "num_local_experts"}) == model
    assert from_hf_config({k: v for k, v in written.items() if k != "num_experts"}) == model


def test_everything_wrong_in_a_config_is_told_at_once():
    raw = facts("llama")["config"] | {
        **{"hidden_act": "relu2", "quantization_config": {"bits": 4}, "partial_rotary_factor": 0.5},
        "rope_scaling": {"rope_type": "mrope"},
    }
    del raw["vocab_size"]
    with pytest.raises(ConversionError) as raised:
        from_hf_config(raw)
    for said in (
        *("hidden_act = 'relu2' is not supported", "quantization_config = ", "partial_rotary_factor = 0.5"),
        *("rope_type = 'mrope'", "vocab_size is missing", "rope_scaling is of type 'mrope' and rope_parameters"),
    ):
        assert said in str(raised.value)
    assert len(raised.value.problems) == 6


@pytest.mark.parametrize("name", KNOWN)
def test_a_value_of_a_wrong_kind_is_told_by_its_key_whatever_it_is(name):
    raw = facts(name)["config"]
    family = family_of_config(raw)
    told = set()
    for key in [*raw, "rope_scaling", "layer_types", "partial_rotary_factor"]:
        for value in ("x", {"rope_type": [1]}):
            config, problems = family.read(raw | {key: value})
            assert config is not None or problems
            if any(key in problem and "is missing" not in problem for problem in problems):
                told.add(key)
    assert family.positions[0] in ("", *told) or family.positions[0] not in raw
    assert "rope_scaling" in told or "rope_parameters" not in raw
