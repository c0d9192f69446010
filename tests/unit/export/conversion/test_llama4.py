"""Text models of Llama 4 that transformers makes are imported and exported with everything equal."""

from typing import Any

import pytest
import torch

from export import huggingface
from export.conversion.walk import ConversionError
from export.hf_config import from_hf_config
from export.import_hf import import_directory
from pretrain.model import build_single
from tests.tiny_models import random_weights
from tests.unit.export.conversion.parity import check_both_ways, check_greedy, random_model

SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 40, "intermediate_size": 24, "intermediate_size_mlp": 56},
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    **{"max_position_embeddings": 64, "num_local_experts": 3, "num_experts_per_tok": 1},
    **{"attention_chunk_size": 16, "floor_scale": 8, "pad_token_id": None},
}
SCOUT = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "original_max_position_embeddings": 8},
    **{"low_freq_factor": 1.0, "high_freq_factor": 1.0},
}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": SCOUT},
        {"interleave_moe_layer_step": 2, "use_qk_norm": False, "attention_bias": True},
        {
            **{"num_hidden_layers": 5, "moe_layers": [1, 2, 4], "no_rope_layers": [1, 0, 0, 1, 1]},
            "layer_types": ["chunked_attention", "chunked_attention", *["full_attention"] * 3],
            "attn_temperature_tuning": False,
        },
    ],
    ids=["Scout", "Maverick", "listed layers"],
)
def test_llama_4(tmp_path, keys):
    model = random_model("llama4_text", **SIZES | keys)
    source = check_both_ways(tmp_path, model)
    assert [layer.index for layer in source.model.layers if layer.moe] == model.config.moe_layers
    rotated = [int(layer.position.kind == "rotary") for layer in source.model.layers]
    assert rotated == model.config.no_rope_layers
    check_greedy(model, source)


def test_the_command_verifies_some_layers(tmp_path):
    random_model("llama4_text", **SIZES).save_pretrained(tmp_path / "hf")
    import_directory(tmp_path / "hf", tmp_path / "ours")
    (tmp_path / "export.toml").write_text(f'run = "{tmp_path / "ours"}"\nout = "{tmp_path / "back"}"\n')
    assert huggingface.main([str(tmp_path / "export.toml"), "verify.greedy_tokens=8", "verify.layers=2"]) == 0


def test_an_expert_is_chosen_by_its_logit_where_sigmoids_are_rounded_to_one():
    config = from_hf_config({"model_type": "llama4_text", **SIZES})
    router = build_single(config, random_weights(config)).layers["0"].moe.router
    with torch.no_grad():
        router.weight.copy_(torch.tensor([30.0, 40.0, 35.0])[:, None].expand_as(router.weight))
    weights, chosen, _ = router(torch.ones(2, config.hidden_size))
    assert chosen.flatten().tolist() == [1, 1] and weights.flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("stated", [{}, {"no_rope_layers": []}, {"no_rope_layers": [1, 1, 1, 0]}])
def test_every_fourth_layer_has_no_positions_where_nothing_says_so(stated):
    """Reads configs without a list of layers, or with an empty one, as Scout has it, which says nothing either."""
    config = from_hf_config({"model_type": "llama4_text", **SIZES, **stated})
    kinds = [(layer.position.kind, layer.attention.pattern, layer.attention.qk_norm) for layer in config.layers]
    assert kinds == [("rotary", "chunked", "unweighted")] * 3 + [("none", "causal", "none")]
    assert [layer.attention.temperature is not None for layer in config.layers] == [False] * 3 + [True]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_experts_per_tok": 2}, "num_experts_per_tok = 2 is not supported in Llama4ForCausalLM; expected 1"),
        ({"attention_chunk_size": None}, "attention_chunk_size = None is not supported"),
        (
            {"no_rope_layers": [1, 0]},
            r"no_rope_layers = \[1, 0\] is not supported.* expected 4 values, each 1 for a layer with positions or 0",
        ),
        ({"moe_layers": []}, r"moe_layers = \[\] is not supported.* at least one layer with experts"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types = .* each 'chunked_attention' or 'full_attention'"),
    ],
)
def test_what_cannot_be_computed_is_refused(keys, said):
    with pytest.raises(ConversionError, match=said):
        from_hf_config({"model_type": "llama4_text", **SIZES, **keys})
