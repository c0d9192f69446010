"""Qwen 1 against a plain reference: from its files into Trivium, and out again as Qwen2, which computes the same."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from configs import presets
from configs.loader import validate
from configs.model import ModelConfig
from export.conversion.family_registry import family_of, family_of_config
from export.conversion.walk import ConversionError, convert, entries
from export.hf_config import from_hf_config
from export.import_hf import import_directory
from export.model_source import open_source
from pretrain.model import build_single
from tests.unit.export.conversion.parity import LENGTH, TOKENS, check_greedy, export_again

VOCAB, HIDDEN, INNER, LAYERS, HEADS = 97, 30, 44, 3, 5
# What config.json of Qwen-7B says, with other sizes.
RAW: dict[str, Any] = {
    **{"architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0},
    **{
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": 2 * INNER,
        "kv_channels": HIDDEN // HEADS,
    },
    **{"layer_norm_epsilon": 1e-06, "max_position_embeddings": 32768, "model_type": "qwen", "no_bias": True},
    **{"num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "onnx_safe": None, "rotary_emb_base": 10000},
    **{"rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 64, "tie_word_embeddings": False},
    **{"tokenizer_class": "QWenTokenizer", "use_cache": True, "use_dynamic_ntk": True, "use_flash_attn": "auto"},
    **{"use_logn_attn": True, "vocab_size": VOCAB},
}
Tensors = dict[str, torch.Tensor]


def tensors() -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        begin = f"transformer.h.{layer}."
        shapes |= {f"{begin}ln_1.weight": (HIDDEN,), f"{begin}ln_2.weight": (HIDDEN,)}
        shapes |= {f"{begin}attn.c_attn.weight": (3 * HIDDEN, HIDDEN), f"{begin}attn.c_attn.bias": (3 * HIDDEN,)}
        shapes |= {f"{begin}attn.c_proj.weight": (HIDDEN, HIDDEN), f"{begin}mlp.c_proj.weight": (HIDDEN, INNER)}
        shapes |= {f"{begin}mlp.w1.weight": (INNER, HIDDEN), f"{begin}mlp.w2.weight": (INNER, HIDDEN)}
    shapes["transformer.ln_f.weight"] = (HIDDEN,)
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=draw) * 0.3 + (1.0 if ".ln_" in name else 0.0)
        for name, shape in shapes.items()
    }


def reference(found: Tensors, tokens: torch.Tensor) -> torch.Tensor:
    """Computes logits [S, V] of one text, by the names of the files."""

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return found[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turned(x: torch.Tensor) -> torch.Tensor:
        size = HIDDEN // HEADS
        angles = torch.arange(len(tokens))[:, None] * 10000.0 ** (-torch.arange(size // 2) * 2 / size)
        both = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([both.real, both.imag], -1)

    x = found["transformer.wte.weight"][tokens]
    for layer in range(LAYERS):
        begin = f"transformer.h.{layer}"
        packed = norm(f"{begin}.ln_1", x) @ found[f"{begin}.attn.c_attn.weight"].T + found[f"{begin}.attn.c_attn.bias"]
        q, k, v = (third.unflatten(-1, (HEADS, -1)).transpose(0, 1) for third in packed.split(HIDDEN, -1))
        scores = turned(q) @ turned(k).mT / math.sqrt(HIDDEN // HEADS)
        later = torch.ones(len(tokens), len(tokens)).triu(1).bool()
        heads = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        x = x + heads.transpose(0, 1).flatten(1) @ found[f"{begin}.attn.c_proj.weight"].T
        y = norm(f"{begin}.ln_2", x)
        inner = y @ found[f"{begin}.mlp.w1.weight"].T * F.silu(y @ found[f"{begin}.mlp.w2.weight"].T)
        x = x + inner @ found[f"{begin}.mlp.c_proj.weight"].T
    return norm("transformer.ln_f", x) @ found["lm_head.weight"].T


def written(folder: Path, found: Tensors, **more: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(RAW | more))
    save_file(found, folder / "model.safetensors")
    return folder


def test_logits_gradients_and_the_way_out_as_qwen2(tmp_path: Path) -> None:
    found = tensors()
    import_directory(written(tmp_path / "hub", found), tmp_path / "ours")
    source = open_source(tmp_path / "ours")
    assert source.context == 64  # beyond it the published code extends positions and scores
    leaves = {name: tensor.requires_grad_() for name, tensor in found.items()}
    decoder, row = build_single(source.model, source.read()), TOKENS[:1]
    ours, wanted = decoder(row, torch.arange(LENGTH)[None])[0], reference(leaves, row[0])
    assert (ours - wanted).abs().max() < 1e-4
    for side in (ours, wanted):
        F.cross_entropy(side[:-1], row[0, 1:]).backward()
    mine, weights = {name: p.grad for name, p in decoder.named_global_parameters()}, source.read()
    walked = entries(family_of_config(RAW), source.model)
    assert {name for entry in walked for name in entry.theirs} == set(found)
    for name, gradient in convert(walked, lambda name: mine[name], source.model, "theirs"):
        other = leaves[name].grad
        assert other is not None and (gradient - other).norm() < 1e-4 * (other.norm() + 1e-3), name
    for name, tensor in convert(walked, lambda name: weights[name], source.model, "theirs"):
        assert torch.equal(tensor, found[name]), name

    assert family_of(source.model, source.architecture).model_type == "qwen2"
    export_again(source, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, local_files_only=True).eval()
    with torch.no_grad():
        assert (model(row).logits[0] - wanted).abs().max() < 1e-4
    check_greedy(model, source)


def test_the_published_config_is_the_preset() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 22016, "kv_channels": 128, "num_attention_heads": 32}
    read = from_hf_config(RAW | sizes | {"num_hidden_layers": 32, "vocab_size": 151936})
    assert read == validate(ModelConfig, presets.filled_in({"model": {"preset": "qwen-7b"}})["model"])


def test_everything_that_is_not_computed_is_told_at_once(tmp_path: Path) -> None:
    found = {name: tensor for name, tensor in tensors().items() if name != "transformer.h.1.mlp.w2.weight"}
    keys = {"rotary_pct": 0.5, "no_bias": False, "kv_channels": 8, "scale_attn_weights": False}
    with pytest.raises(ConversionError) as raised:
        import_directory(written(tmp_path / "hub", found, **keys), tmp_path / "ours")
    for said in (*keys, "1 tensor is missing that QWenLMHeadModel has: transformer.h.1.mlp.w2.weight"):
        assert said in str(raised.value)
    with pytest.raises(ConversionError, match=r"intermediate_size = 33 is not supported .* expected an even number"):
        from_hf_config(RAW | {"intermediate_size": 33})
