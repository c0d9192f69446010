"""Qwen3-Next: models that transformers makes, in and out, with everything equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from export import huggingface
from export.conversion.walk import ConversionError
from export.hf_config import from_hf_config
from export.import_hf import import_directory
from export.model_source import open_source
from tests.unit.export.conversion.parity import (
    TOKENS,
    check_both_ways,
    check_greedy,
    export_again,
    loss_of_modules,
    random_model,
)

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
        {"num_hidden_layers": 2, "full_attention_interval": 2},
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
    check_greedy(model, source)


def with_module(folder: Path, model: Any) -> dict[str, torch.Tensor]:
    """Saves a model with a random module of multi-token prediction, by the names of published files; returns it."""
    model.save_pretrained(folder)
    file, last, hidden = folder / "model.safetensors", model.config.num_hidden_layers - 1, model.config.hidden_size
    whole, own = load_file(file), {}
    for name, tensor in whole.items():
        if f"layers.{last}." in name:
            own[name.replace(f"model.layers.{last}.", "mtp.layers.0.")] = torch.randn(tensor.shape) * 0.2
    own |= {
        f"mtp.{name}.weight": torch.randn(hidden) * 0.2
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    }
    own["mtp.fc.weight"] = torch.randn(hidden, 2 * hidden) * 0.2
    save_file(whole | own, file, {"format": "pt"})
    return own


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + weight)


def test_the_module_of_multi_token_prediction(tmp_path):
    """transformers leaves it out, so its block is taken as the only layer of another model of its class."""
    keys = {"num_hidden_layers": 2, "full_attention_interval": 2}
    module = with_module(tmp_path / "hf", calm_model(**keys))
    import_directory(tmp_path / "hf", tmp_path / "ours")
    source = open_source(tmp_path / "ours")
    assert source.model.head.mtp_depth == 1
    written = export_again(source, tmp_path / "back")
    whole = load_file(tmp_path / "hf/model.safetensors")
    assert set(written.files) == set(whole)
    assert all(torch.equal(written.read(name), tensor) for name, tensor in whole.items())

    raw = json.loads((tmp_path / "hf/config.json").read_text())
    alone = {name.replace("mtp.", "model."): tensor for name, tensor in module.items() if "layers" in name}
    alone |= {name: whole[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    alone["model.norm.weight"] = module["mtp.norm.weight"]
    (tmp_path / "one").mkdir()
    save_file(alone, tmp_path / "one/model.safetensors", {"format": "pt"})
    one_layer = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (tmp_path / "one/config.json").write_text(json.dumps(raw | one_layer))
    main, block = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32, local_files_only=True).eval()
        for name in ("hf", "one")
    )
    tokens = TOKENS[:1]
    with torch.no_grad():
        hidden = main.model(tokens).last_hidden_state[:, :-1]
        embedded = main.get_input_embeddings()(tokens[:, 1:])
        both = (
            normed(embedded, module["mtp.pre_fc_norm_embedding.weight"]),
            normed(hidden, module["mtp.pre_fc_norm_hidden.weight"]),
        )
        logits = block(inputs_embeds=torch.cat(both, -1) @ module["mtp.fc.weight"].T, use_cache=False).logits
        theirs = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 2:])
    assert loss_of_modules(source, tokens) == pytest.approx([float(theirs)], rel=1e-4)


def test_a_second_module_is_refused(tmp_path):
    module = with_module(tmp_path / "hf", calm_model(num_hidden_layers=2, full_attention_interval=2))
    file = tmp_path / "hf/model.safetensors"
    second = {"mtp.layers.1.mlp.gate.weight": module["mtp.layers.0.mlp.gate.weight"].clone()}
    save_file(load_file(file) | second, file, {"format": "pt"})
    with pytest.raises(ConversionError, match=r"1 tensor is not part of .*mtp\.layers\.1\.mlp\.gate\.weight"):
        import_directory(tmp_path / "hf", tmp_path / "ours")


@pytest.mark.full
def test_the_command_publishes_a_model_and_its_module(tmp_path):
    module = with_module(tmp_path / "hf", calm_model(max_position_embeddings=128))
    import_directory(tmp_path / "hf", tmp_path / "ours")
    (tmp_path / "export.toml").write_text(f'run = "{tmp_path / "ours"}"\nout = "{tmp_path / "out"}"\n')
    assert huggingface.main([str(tmp_path / "export.toml"), "verify.greedy_tokens=64"]) == 0
    assert module.keys() <= load_file(tmp_path / "out/model.safetensors").keys()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"layer_types": ["linear_attention"]}, r"layer_types = .*expected 4 values, each 'linear_attention' or"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types = .*expected 4 values"),
        ({"full_attention_interval": 0}, "full_attention_interval = 0 is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported in Qwen3NextForCausalLM; expected 'silu'"),
        ({"linear_num_value_heads": 5}, "num_value_heads = 5 is not a multiple of num_key_heads = 2"),
        (
            {"mlp_only_layers": [0, 1, 2, 3]},  # and nothing else is told of experts
            r"^config\.json: mlp_only_layers = \[0, 1, 2, 3\] is not supported .* or of Qwen3 if [a-z ]+\)$",
        ),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
    ],
)
def test_what_gated_delta_nets_of_trivium_do_not_do_is_refused(keys, said):
    with pytest.raises(ConversionError, match=said):
        from_hf_config({"model_type": "qwen3_next", **SIZES, **keys})


def test_keys_that_are_absent_mean_what_they_do_in_transformers():
    config = from_hf_config(
        {
            "model_type": "qwen3_next",
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 56,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
        }
    )
    assert [bool(layer.attention.delta) for layer in config.layers] == [True, True, True, False] * 2
    assert config.attention.delta is not None and tuple(dict(config.attention.delta).values()) == (16, 32, 128, 128, 4)
    assert (config.dim_per_head, config.num_kv_heads, config.position.fraction) == (256, 2, 0.25)
