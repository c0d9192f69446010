"""Baichuan 1 and 2 against a plain reference: from their files into Trivium, and out again as LLaMA where it is one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from configs.model import ModelConfig
from export.conversion.family_registry import WITHOUT_CLASS, family_of, family_of_config
from export.conversion.walk import ConversionError, convert, entries
from export.hf_config import from_hf_config
from export.hf_writer import reader_as, with_plain_head, write_weights
from export.import_hf import import_directory
from export.model_source import ModelSource, Weights, open_source
from pretrain.model import build_single
from tests.unit.export.conversion import baichuan_reference
from tests.unit.export.conversion.parity import LENGTH, TOKENS

VOCAB, HIDDEN, INNER, LAYERS, HEADS = 97, 36, 56, 3, 6
POSITIONS = torch.arange(LENGTH)[None].expand_as(TOKENS)
SIZES: dict[str, Any] = {
    **{"hidden_act": "silu", "hidden_size": HIDDEN, "initializer_range": 0.02, "intermediate_size": INNER},
    **{"model_type": "baichuan", "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": VOCAB},
    **{"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
# What the published config.json of each size have beside the sizes.
KINDS: dict[str, dict[str, Any]] = {
    "7b": {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 64},
    "13b": {"architectures": ["BaichuanForCausalLM"], "model_max_length": 64},
    "2-7b": {
        **{"architectures": ["BaichuanForCausalLM"], "max_position_embeddings": 64, "model_max_length": 64},
        "z_loss_weight": 0,
    },
    "2-13b": {"architectures": ["BaichuanForCausalLM"], "model_max_length": 64, "z_loss_weight": 0},
}


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        begin = f"model.layers.{layer}."
        shapes |= {
            f"{begin}self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN),
            f"{begin}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{begin}mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{begin}mlp.up_proj.weight": (INNER, HIDDEN),
            f"{begin}mlp.down_proj.weight": (HIDDEN, INNER),
            f"{begin}input_layernorm.weight": (HIDDEN,),
            f"{begin}post_attention_layernorm.weight": (HIDDEN,),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return {
        name: torch.randn(shape, generator=draw) * 0.3 + (1.0 if "norm" in name else 0.0)
        for name, shape in shapes.items()
    }


def imported(tmp_path: Path, kind: str, **more: Any) -> tuple[dict[str, torch.Tensor], ModelSource]:
    """Writes a folder of this kind and imports it; returns the folder's tensors and the model."""
    folder, found = tmp_path / "files", tensors()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES | KINDS[kind] | more))
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(LAYERS)}
    save_file(found | (frequencies if "max_position_embeddings" in KINDS[kind] else {}), folder / "model.safetensors")
    import_directory(folder, tmp_path / "ours")
    return found, open_source(tmp_path / "ours")


@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_the_way_back(tmp_path, kind):
    found, source = imported(tmp_path, kind)
    alibi, normalized = "13b" in kind, kind.startswith("2-")
    assert (source.model.position.kind, source.context) == ("alibi" if alibi else "rotary", 64)
    leaves = {name: tensor.requires_grad_() for name, tensor in found.items()}
    wanted = baichuan_reference.logits(leaves, HEADS, alibi, normalized, TOKENS)
    decoder = build_single(source.model, source.read())
    ours = decoder(TOKENS, POSITIONS)
    assert (ours - wanted).abs().max() < 1e-4
    for side in (ours, wanted):
        F.cross_entropy(side[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    family, weights = WITHOUT_CLASS[0], source.read()
    mine = {name: parameter.grad for name, parameter in decoder.named_global_parameters()}
    walked = entries(family, source.model)
    assert {name for entry in walked for name in entry.theirs} == set(found)
    for name, gradient in convert(walked, lambda name: mine[name], source.model, "theirs"):
        other = leaves[name].grad
        assert (gradient - other).norm() < 1e-4 * (other.norm() + 1e-3), name
    for name, tensor in convert(walked, lambda name: weights[name], source.model, "theirs"):
        assert torch.equal(tensor, found[name]), name


@torch.no_grad()
def transformers_logits(source: ModelSource, folder: Path) -> torch.Tensor:
    """Returns the logits of transformers' model of the folder that the writer makes, which is a LLaMA's."""
    folder.mkdir()
    with source.weights() as weights:
        model, weights = with_plain_head(source.model, weights)
        family = family_of(model, source.architecture)
        assert family.model_type == "llama"
        write_weights(family, model, weights, reader_as("auto", family, model, weights), 1.0, folder)
    (folder / "config.json").write_text(json.dumps(family.write(model, 64)))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS).logits


@pytest.mark.parametrize("kind", ["7b", "2-7b"])
def test_those_with_rotary_positions_are_llamas_whose_head_is_normalized_once(tmp_path, kind):
    found, source = imported(tmp_path, kind)
    with torch.no_grad():
        wanted = baichuan_reference.logits(found, HEADS, False, kind.startswith("2-"), TOKENS)
    assert (transformers_logits(source, tmp_path / "hf") - wanted).abs().max() < 1e-4


def test_a_normalized_head_that_is_the_embedding_becomes_one_of_its_own():
    config = from_hf_config(SIZES | KINDS["2-7b"] | {"tie_word_embeddings": True})
    own = {name: torch.randn(shape.shape) for name, shape in build_weights(config).items()}
    plain, weights = with_plain_head(config, Weights({n: tuple(t.shape) for n, t in own.items()}, own.__getitem__))
    assert (plain.tie_embeddings, plain.head.normalized) == (False, False)
    with torch.no_grad():
        first = build_single(config, own)(TOKENS, POSITIONS)
        again = build_single(plain, {name: weights.read(name) for name in weights.shapes})(TOKENS, POSITIONS)
    assert (first - again).abs().max() < 1e-5


def build_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    from pretrain.model import Decoder

    return {name: parameter.data for name, parameter in Decoder(config).named_global_parameters()}


@pytest.mark.parametrize("kind", ["13b", "2-13b"])
def test_those_with_alibi_are_refused_by_export_since_transformers_has_no_class(tmp_path, kind):
    _, source = imported(tmp_path, kind)
    with source.weights() as weights:
        model, _ = with_plain_head(source.model, weights)
    with pytest.raises(ValueError, match=r"what BaichuanForCausalLM does, for which transformers has no class; use it"):
        family_of(model, source.architecture)


def test_the_vocabulary_of_baichuan_2_tells_its_head_too():
    for tokens, normalized in ((125696, True), (64000, False)):
        raw = SIZES | KINDS["7b"] | {"vocab_size": tokens}
        assert from_hf_config(raw).head.normalized is normalized
    assert family_of_config(SIZES).architecture == "BaichuanForCausalLM"


def test_projections_of_their_own_are_missing_ones(tmp_path):
    folder, found = tmp_path / "files", tensors()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES | KINDS["13b"]))
    found["model.layers.1.self_attn.q_proj.weight"] = found.pop("model.layers.1.self_attn.W_pack.weight")
    save_file(found, folder / "model.safetensors")
    with pytest.raises(
        ConversionError, match=r"layers\.1\.self_attn\.W_pack\.weight(.|\n)*layers\.1\.self_attn\.q_proj"
    ):
        import_directory(folder, tmp_path / "ours")
