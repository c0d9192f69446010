"""Published models by preset: their config.json makes transformers' class of them, with all parameters."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from configs import presets
from configs.loader import load
from export.conversion.registry import differences, family_of
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
}


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
    assert sum(parameter.numel() for parameter in theirs.parameters()) == model.num_parameters()
