"""Models of GPT-1 to 3, OPT, GPT-NeoX and BLOOM that transformers makes are imported and exported, all being equal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs import presets
from configs.loader import validate
from configs.model import ModelConfig
from configs.sampling import GREEDY
from export.conversion.family_registry import family_of
from export.conversion.walk import ConversionError
from export.hf_config import from_hf_config, to_hf_config
from export.import_hf import import_directory
from export.model_source import open_source
from pretrain.generation.sampling import generate
from pretrain.model import build_single
from tests.tiny_models import random_weights
from tests.unit.export.conversion.parity import LENGTH, TOKENS, check_both_ways, exported_logits, random_model

GPT = {"vocab_size": 97, "n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 64}
GPT1 = GPT | {"n_embd": 40, "n_head": 4}
OPT = {
    **{"vocab_size": 97, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6, "ffn_dim": 56},
    # transformers gives no gradient to the row of the padding token.
    **{"max_position_embeddings": 64, "pad_token_id": None, "word_embed_proj_dim": 36},
}
NEOX = {
    **{"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3},
    **{"intermediate_size": 72, "max_position_embeddings": 64},
}
# Six heads are no power of two, so ALiBi has slopes of two series.
BLOOM = {"vocab_size": 97, "hidden_size": 36, "n_layer": 3, "n_head": 6}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT),
    "gpt2, other width": ("gpt2", GPT | {"n_inner": 56, "activation_function": "gelu", "n_head": 4}),
    "gpt2, relu, no scale": ("gpt2", GPT | {"activation_function": "relu", "scale_attn_weights": False}),
    "gpt2, scores by layer": ("gpt2", GPT | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, own head": ("gpt2", GPT | {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
    "openai-gpt": ("openai-gpt", GPT1),
    "openai-gpt, relu": ("openai-gpt", GPT1 | {"afn": "relu"}),
    "opt": ("opt", OPT),
    "opt, norms after sums": ("opt", OPT | {"do_layer_norm_before": False}),
    "opt, no final norm": ("opt", OPT | {"_remove_final_layer_norm": True}),
    "opt, gelu, no biases": ("opt", OPT | {"activation_function": "gelu", "enable_bias": False}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox, in turn": ("gpt_neox", NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt_neox, half": (
        "gpt_neox",
        NEOX
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
        | {"attention_bias": False, "tie_word_embeddings": True},
    ),
    # 0.25 of 10 elements: transformers rotates 2.
    "gpt_neox, no whole share": ("gpt_neox", NEOX | {"hidden_size": 30}),
    "bloom": ("bloom", BLOOM),
    "bloom, sums from norms": ("bloom", BLOOM | {"apply_residual_connection_post_layernorm": True, "n_head": 4}),
    "bloom, one head": ("bloom", BLOOM | {"n_head": 1, "tie_word_embeddings": False}),
}


def made(case: str, **more: Any) -> Any:
    model_type, keys = MODELS[case]
    return random_model(model_type, **keys | more)


@pytest.mark.parametrize("case", MODELS)
def test_in_and_out_and_greedy_tokens(tmp_path, case):
    model = made(case)
    source = check_both_ways(tmp_path, model)
    assert source.architecture == type(model).__name__
    decoder = build_single(source.model, source.read())
    prompts = [TOKENS[0, :7].tolist(), TOKENS[1, :2].tolist()]
    ours = generate(decoder, prompts, 12, GREEDY)
    for prompt, completion in zip(prompts, ours, strict=True):
        assert list(completion.tokens) == greedy(model, prompt, 12)


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_the_cache_gives_the_logits_of_whole_rows(tmp_path, case):
    # Random models soon repeat a token, so that greedy tokens alone would not tell a cache that is a little wrong.
    model, folder = saved(tmp_path, case)
    import_directory(folder, tmp_path / "ours")
    source = open_source(tmp_path / "ours")
    decoder = build_single(source.model, source.read())
    cache = decoder.new_cache(len(TOKENS), LENGTH)
    parts = [decoder(TOKENS[:, :7], torch.arange(7)[None].expand(len(TOKENS), -1), cache=cache)]
    for position in range(7, LENGTH):
        cache.longest = position
        here = torch.full((len(TOKENS), 1), position)
        parts.append(decoder(TOKENS[:, position : position + 1], here, cache=cache))
    assert (torch.cat(parts, dim=1) - model(TOKENS).logits).abs().max() < 1e-4


@torch.inference_mode()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Returns the tokens with which transformers continues a prompt; none of them ends the text."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
    tokens = torch.tensor([prompt])
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=settings)
    return found[0, len(prompt) :].tolist()


def saved(tmp_path: Path, case: str, **more: Any) -> tuple[Any, Path]:
    model, folder = made(case, **more), tmp_path / "hf"
    model.save_pretrained(folder)
    return model, folder


def rewrite(folder: Path, name_of: Any, more: dict[str, torch.Tensor]) -> None:
    """Writes the folder's tensors again under other names, with some that are of no use."""
    tensors = load_file(folder / "model.safetensors")
    renamed = {name_of(name): tensor for name, tensor in tensors.items()}
    save_file(renamed | more, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("case", "prefix", "extra"),
    [
        ("gpt2", "transformer.", "h.1.attn.bias"),
        ("openai-gpt", "transformer.", "h.1.attn.bias"),
        ("bloom", "transformer.", None),
        ("opt", "model.", None),
    ],
)
def test_published_files_leave_the_prefix_out_and_have_masks(tmp_path, case, prefix, extra):
    model, folder = saved(tmp_path, case)
    rewrite(folder, lambda name: name.removeprefix(prefix), {extra: torch.ones(1, 1, 4, 4)} if extra else {})
    import_directory(folder, tmp_path / "ours")
    assert logits_agree(model, tmp_path / "ours")


def test_masks_and_frequencies_in_old_files_of_pythia_are_passed_over(tmp_path):
    model, folder = saved(tmp_path, "gpt_neox")
    begin = "gpt_neox.layers.1.attention."
    old = {"bias": torch.ones(1, 1, 4, 4), "masked_bias": torch.ones(1), "rotary_emb.inv_freq": torch.ones(2)}
    rewrite(folder, lambda name: name, {begin + name: tensor for name, tensor in old.items()})
    import_directory(folder, tmp_path / "ours")
    assert logits_agree(model, tmp_path / "ours")


@torch.no_grad()
def logits_agree(model: Any, folder: Path) -> bool:
    source = open_source(folder)
    ours = build_single(source.model, source.read())(TOKENS, torch.arange(LENGTH)[None].expand_as(TOKENS))
    return bool((ours - model(TOKENS).logits).abs().max() < 1e-4)


def test_rows_without_a_position_come_back_as_they_were_and_serve_left_padding(tmp_path):
    model, folder = saved(tmp_path, "opt")
    table = load_file(folder / "model.safetensors")["model.decoder.embed_positions.weight"]
    import_directory(folder, tmp_path / "ours")
    source = open_source(tmp_path / "ours")
    assert torch.equal(source.read()["position_embedding.weight"], table[2:])
    assert source.context == 64
    # Padding on the left moves no token away from its position: the first token of a text has position 0.
    padded = torch.cat([torch.ones(2, 3, dtype=torch.long), TOKENS], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(TOKENS)], dim=1)
    with torch.no_grad():
        ours = build_single(source.model, source.read())(TOKENS, torch.arange(LENGTH)[None].expand_as(TOKENS))
        assert (ours - model(padded, attention_mask=mask).logits[:, 3:]).abs().max() < 1e-4


def test_opt_350m_is_refused_with_its_reason(tmp_path):
    _, folder = saved(tmp_path, "opt", word_embed_proj_dim=20, do_layer_norm_before=False)
    with pytest.raises(
        ConversionError, match=r"proj_dim = 20 is not hidden_size = 36.*OPT-350m\); import another size of OPT"
    ):
        import_directory(folder, tmp_path / "ours")
    _, folder = saved(tmp_path / "other", "opt")
    import_directory(folder, tmp_path / "ours")


@pytest.mark.parametrize(
    ("case", "key", "value", "said"),
    [
        ("gpt2", "add_cross_attention", True, "add_cross_attention = True"),
        ("gpt2", "activation_function", "silu", "activation_function = 'silu'"),
        ("openai-gpt", "afn", "swish", "afn = 'swish'"),
        ("opt", "activation_function", "gelu_new", "activation_function = 'gelu_new'"),
        ("opt", "layer_norm_elementwise_affine", False, "layer_norm_elementwise_affine = False"),
        ("gpt_neox", "hidden_act", "silu", "hidden_act = 'silu'"),
    ],
)
def test_values_that_nothing_computes_are_refused_by_key(tmp_path, case, key, value, said):
    model_type, keys = MODELS[case]
    with pytest.raises(ConversionError, match=said):
        from_hf_config({"model_type": model_type, **keys, key: value})


def test_sums_that_leave_out_biases_are_refused_only_where_they_are_taken():
    raw = {"model_type": "bloom", **BLOOM, "slow_but_exact": True}
    from_hf_config(raw | {"pretraining_tp": 1})
    with pytest.raises(ConversionError, match="slow_but_exact = True"):
        from_hf_config(raw | {"pretraining_tp": 4})


# Configs as published: old names, and nothing that is a default.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2-124m": {
        **{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1},
        **{"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02},
        **{"layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12},
        **{"n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "vocab_size": 50257},
    },
    "openai-gpt": {
        **{"afn": "gelu", "architectures": ["OpenAIGPTLMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1},
        **{"initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "openai-gpt", "n_ctx": 512},
        **{"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 512, "n_special": 0, "vocab_size": 40478},
    },
    "bloom-560m": {
        **{"apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "bias_dropout_fusion": True},
        **{"hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "bloom"},
        **{"n_embed": 1024, "n_inner": None, "n_layer": 24, "num_attention_heads": 16, "offset_alibi": 100},
        **{"pretraining_tp": 1, "vocab_size": 250880},
    },
    "opt-125m": {
        **{"activation_function": "relu", "architectures": ["OPTForCausalLM"], "do_layer_norm_before": True},
        **{"dropout": 0.1, "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02, "max_position_embeddings": 2048},
        **{"model_type": "opt", "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 50272},
        **{"word_embed_proj_dim": 768, "prefix": "</s>"},
    },
    "pythia-1.4b": {
        **{"architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "hidden_size": 2048},
        **{"initializer_range": 0.02, "intermediate_size": 8192, "layer_norm_eps": 1e-05, "model_type": "gpt_neox"},
        **{"max_position_embeddings": 2048, "num_attention_heads": 16, "num_hidden_layers": 24, "rotary_pct": 0.25},
        **{"rotary_emb_base": 10000, "tie_word_embeddings": False, "use_parallel_residual": True},
        "vocab_size": 50304,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_presets_of_their_names(name):
    read, preset = from_hf_config(PUBLISHED[name]), presets.filled_in({"model": {"preset": name}})["model"]
    preset.pop("init_std", None)
    assert read == validate(ModelConfig, preset | {"init_std": read.init_std})
    assert family_of(read).model_type == PUBLISHED[name]["model_type"]


def test_rotary_positions_have_their_old_names_too():
    old = {"model_type": "gpt_neox", **NEOX, "rotary_pct": 0.5, "rotary_emb_base": 300}
    model = from_hf_config(old)
    assert (model.position.fraction, model.position.theta) == (0.5, 300.0)
    written = to_hf_config(model, 64, "float32", 1, 2, None)
    assert (written["rotary_pct"], written["rotary_emb_base"]) == (0.5, 300.0)
    assert written["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert from_hf_config({"model_type": "gpt_neox", **NEOX}).position.fraction == 0.25  # what the class takes
    thirty = from_hf_config(old | {"hidden_size": 132, "rotary_pct": 0.69}).position.fraction  # of 30.36
    assert int(44 * thirty) == 30 and int(44 * (30 / 44)) == 29


def shrunk(name: str, **changes: Any) -> ModelConfig:
    small = {"vocab_size": 97, "hidden_size": 48, "ffn_hidden_size": 192, "num_layers": 4, "num_heads": 6}
    tree = presets.filled_in({"model": {"preset": name}})["model"] | small | {"num_kv_heads": 6}
    return validate(ModelConfig, tree | changes)


def test_gpt3_with_dense_layers_alone_is_exported_as_gpt2(tmp_path):
    config = shrunk("gpt3-175b", layer_pattern=[], kinds={})
    weights = random_weights(config)
    with torch.no_grad():
        ours = build_single(config, weights)(TOKENS, torch.arange(LENGTH)[None].expand_as(TOKENS))
    assert (ours - exported_logits(config, weights, tmp_path / "hf")).abs().max() < 1e-4
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (raw["model_type"], raw["n_positions"]) == ("gpt2", 2048)


def test_gpt3_with_banded_layers_trains_and_is_refused_by_gpt2():
    kinds = {"dense": {}, "banded": {"pattern": "sliding", "window": 8}}
    config = shrunk("gpt3-175b", layer_pattern=["dense", "banded"], kinds=kinds)
    weights = random_weights(config)
    with torch.no_grad():
        logits = build_single(config, weights)(TOKENS, torch.arange(LENGTH)[None].expand_as(TOKENS))
    assert logits.isfinite().all()
    said = r"GPT2LMHeadModel, .* has model\.attention\.pattern in layer 1 = 'causal', not 'sliding'"
    with pytest.raises(ValueError, match=said):
        family_of(config)


@pytest.mark.parametrize("name", ["gpt2-124m", "openai-gpt", "opt-125m", "pythia-1.4b", "bloom-560m"])
def test_a_model_trained_here_is_exported_as_the_class_of_its_family(name):
    found = family_of(shrunk(name)).model_type
    assert found == PUBLISHED[name]["model_type"]
