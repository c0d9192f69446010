"""Published models by preset: their config.json makes transformers' class of them, with all parameters."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs import presets
from configs.loader import load
from configs.model import ModelConfig
from export.conversion.family_registry import FAMILIES, computation, differences, family_of
from export.hf_config import from_hf_config, to_hf_config

CLASSES = {
    "chatglm2-6b": "GlmForCausalLM",
    "glm-4-9b": "GlmForCausalLM",
    "glm-4-9b-0414": "Glm4ForCausalLM",
    "glm-4.5-air": "Glm4MoeForCausalLM",
    "llama-4-maverick": "Llama4ForCausalLM",
    "llama-4-scout": "Llama4ForCausalLM",
    "deepseek-v2": "DeepseekV2ForCausalLM",
    "deepseek-v2-lite": "DeepseekV2ForCausalLM",
    "deepseek-v3": "DeepseekV3ForCausalLM",
    "kimi-k2": "DeepseekV3ForCausalLM",
    "qwen3-next-80b-a3b": "Qwen3NextForCausalLM",
}
# Where a published model is not what transformers' config of its class describes by default. Sizes are not compared.
LLAMA_3 = {"norm.eps", "position.theta"}
QWEN = {"position.theta"}
UNLIKE_DEFAULTS: dict[str, set[str]] = {
    "llama-2-70b": {"norm.eps"},
    "llama-65b": {"norm.eps"},
    "llama-3-8b": LLAMA_3,
    "llama-3-70b": LLAMA_3,
    "llama-3.1-405b": {*LLAMA_3, "position.scaling"},
    "llama-3.2-1b": {*LLAMA_3, "position.scaling", "tie_embeddings"},
    "mistral-7b-v0.1": {"norm.eps"},
    "qwen2.5-0.5b": {*QWEN, "tie_embeddings"},
    "qwen2.5-7b": QWEN,
    "qwen3-0.6b": {*QWEN, "tie_embeddings"},
    "qwen3-8b": QWEN,
    "qwen1.5-moe-a2.7b": QWEN,
    "qwen2-57b-a14b": QWEN,
    "qwen3-235b-a22b": {*QWEN, "moe.renormalize"},
    "qwen3-30b-a3b": {*QWEN, "moe.renormalize"},
    "qwen3-next-80b-a3b": QWEN,
    "deepseek-v2": {"position.scaling", "moe.num_groups", "moe.routed_scaling"},
    "deepseek-v2-lite": {"position.scaling", "attention.latent"},
    "deepseek-v3": {"position.scaling"},
    "kimi-k2": {"position.scaling", "position.theta", "moe.routed_scaling", "moe.num_groups"},
    "chatglm2-6b": {"norm.eps"},
    "glm-4.5-air": {"attention.qkv_bias", "position.theta"},
    "llama-4-maverick": {"attention.qk_norm"},
    "llama-4-scout": {"position.scaling"},
    "gemma-3-1b": {"attention.window"},
    "phi-3-mini-4k": {"attention.pattern", "attention.window"},
    "olmo-2-7b": {"norm.eps", "position.theta"},
    "olmo-2-13b": {"norm.eps", "position.theta"},
    "olmo-2-32b": {"norm.eps", "position.theta"},
}
WITHOUT_DEFAULTS = ("baichuan-13b", "baichuan2-7b", "baichuan2-13b", "glm-130b", "gpt3-175b")  # no class has all of it
SIZES = ("vocab_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "position.max_positions")
SIZES_OF_EXPERTS = ("moe", "moe.num_experts", "moe.top_k", "moe.top_groups", "moe.group_score")
# Keys that these classes have no default for, or none that makes a model.
GIVEN = {"deepseek_v2": {"num_experts_per_tok": 6}, "glm4_moe": {"head_dim": 128}}
OWN_CLASS = {"phi-3-mini-4k": "phi3"}  # a Mistral could express it too


def parts(model: ModelConfig) -> dict[str, set[str]]:
    """Returns what the model computes with but for sizes: of each key the values of all layers that have it."""
    found = {key: {repr(value) for value in values} - {"None"} for key, values in computation(model).items()}
    left_out = (*SIZES, *SIZES_OF_EXPERTS, "attention.scale")  # which follows from the size of a head
    return {key: values for key, values in found.items() if key not in left_out and "hidden_size" not in key}


@pytest.mark.parametrize("name", [name for name in presets.names() if name not in WITHOUT_DEFAULTS])
def test_a_preset_has_the_parts_of_its_class_by_default(name: str) -> None:
    model = load(presets.Preset, presets.FOLDER / f"{name}.toml").model
    family = next(one for one in FAMILIES if one.model_type == OWN_CLASS.get(name, family_of(model).model_type))
    raw = AutoConfig.for_model(family.model_type).to_dict() | GIVEN.get(family.model_type, {})
    ours, theirs = parts(model), parts(from_hf_config(raw))
    unlike = {key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}
    assert unlike - set(family.converted) == UNLIKE_DEFAULTS.get(name, set())


@pytest.mark.parametrize("name", CLASSES)
def test_a_preset_is_its_class_with_all_parameters(name: str) -> None:
    model = load(presets.Preset, presets.FOLDER / f"{name}.toml").model
    family = family_of(model)
    assert (family.architecture, differences(model, family)) == (CLASSES[name], {})
    written = to_hf_config(model, 131072, "bfloat16", 1, 2, None)
    assert from_hf_config(written).layers[-1].position == model.layers[-1].position
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written))
    assert type(theirs).__name__ == CLASSES[name]
    assert sum(parameter.numel() for parameter in theirs.parameters()) == model.without_mtp().num_parameters()
