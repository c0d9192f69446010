"""Qwen3-Next: models that transformers makes, in and out, with everything equal."""

from typing import Any

import pytest
import torch

from tests.unit.export.conversion.parity import check_both_ways, check_greedy, random_model

SIZES: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 6, "linear_value_head_dim": 10},
    **{"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "pad_token_id": None},
    **{"shared_expert_intermediate_size": 28, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
}


def calm_model(**keys: Any) -> Any:
    """Returns a random model of smaller weights, whose norms of (1 + w) multiply by about one and not by two.

    Where all that a state holds is nearly orthogonal to a query, the norm of a head's output makes rounding large: the
    logits of a model as random as others' differ by 2e-4 between fp32 and fp64, in transformers as in Trivium.
    """
    model = random_model("qwen3_next", **SIZES | keys)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name
            parameter.sub_(float(is_norm and "linear_attn" not in name)).mul_(1.0 if is_norm else 0.6)
    return model


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {
            **{"num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "linear_attention"]},
            **{"attention_bias": True, "linear_conv_kernel_dim": 3, "mlp_only_layers": [1], "norm_topk_prob": False},
            "linear_num_key_heads": 3,
        },
    ],
    ids=["as published", "other choices"],
)
def test_qwen3_next(tmp_path, keys):
    model = calm_model(**keys)
    source = check_both_ways(tmp_path, model)
    kinds = ["linear_attention" if layer.attention.delta else "full_attention" for layer in source.model.layers]
    assert kinds == model.config.layer_types
    check_greedy(model, source, 64)
