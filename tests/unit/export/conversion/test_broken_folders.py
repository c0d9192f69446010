"""Broken folders of families beside LLaMA: each fault is one clear error that names what to do, and nothing is written.

A fault of LLaMA's folders is in tests/unit/export/test_import.py.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.loader import ConfigError
from export.import_hf import main
from tests.unit.export.conversion.parity import random_model

GPT = {"vocab_size": 97, "n_embd": 36, "n_layer": 3, "n_head": 6, "n_positions": 64}
SIZES = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 72}
# The family, its name for a norm of the second layer, and the head's name.
FAMILIES = {
    "gpt2": ("transformer.h.1.ln_1.weight", "lm_head.weight"),
    "openai-gpt": ("transformer.h.1.ln_1.weight", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.layers.1.input_layernorm.weight", "embed_out.weight"),
    "bloom": ("transformer.h.1.input_layernorm.weight", "lm_head.weight"),
}


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        main([str(folder), str(folder.with_name("out"))])
    assert not folder.with_name("out").exists()
    return str(raised.value)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Puts tensors in the place of others in the folder's file, or takes them out."""
    found = load_file(folder / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_each_fault_is_one_clear_error(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    norm, head = FAMILIES[family]
    sizes = GPT if family in ("gpt2", "openai-gpt") else SIZES
    model, folder = random_model(family, **sizes, tie_word_embeddings=False), tmp_path / "hf"
    model.save_pretrained(folder, max_shard_size="40KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = load_file(shard)
    lost = min(whole)
    save_file({name: one for name, one in whole.items() if name != lost} | {"x": torch.ones(1)}, shard)
    index = "there by model.safetensors.index.json; fetch the file again"
    assert f"{shard} lacks {lost}, {index}" in refused(folder)
    save_file(whole | {lost: torch.ones(7, 7, 7)}, shard)
    assert f"1 tensor is of another shape than the config gives: {lost} (7, 7, 7) instead of" in refused(folder)
    save_file(whole, shard, metadata={"format": "pt"})
    capsys.readouterr()
    assert main([str(folder), str(tmp_path / "dry"), "--dry-run"]) == 0
    assert ": every tensor is there; nothing was written" in " ".join(capsys.readouterr().out.split())
    shard.unlink()
    assert refused(folder) == f"{shard} is missing, but model.safetensors.index.json names it; fetch it again"
    for file in folder.glob("model*"):
        file.unlink()

    model.save_pretrained(folder)
    right = load_file(folder / "model.safetensors")
    change(folder, **{norm: None, f"{norm}s": right[norm]})
    said = refused(folder)
    assert said.startswith("2 problems:") and "again, or the config.json that belongs to them" in said
    assert f"1 tensor is missing that {type(model).__name__} has: {norm};" in said
    assert f"1 tensor is not part of {type(model).__name__}: {norm}s" in said

    change(folder, **{f"{norm}s": None, norm: right[norm].long()})
    assert refused(folder) == (
        f"{norm} is I64, and weights are F32, BF16, F16 or F64; name a folder of the model that is not quantized"
    )

    for number in (float("nan"), float("-inf")):
        broken = right[head].clone()
        broken[3, 2] = number
        change(folder, **{norm: right[norm], head: broken})
        words = "computes nothing; fetch the files again, or ask whoever made them"
        assert "have NaN or infinite numbers in lm_head.weight (by" in (said := refused(folder)) and words in said

    change(folder, **{norm: right[norm], head: None})
    assert refused(folder).endswith(
        f"has: {head}; if the output head is the embedding, set tie_word_embeddings = true in config.json"
    )
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))
    assert main([str(folder), str(tmp_path / "tied"), "--dry-run"]) == 0

    (folder / "config.json").write_text(json.dumps({key: raw[key] for key in raw if "_token_id" not in key}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    change(folder, **{head: right[head]})
    capsys.readouterr()
    assert main([str(folder), str(tmp_path / "endless")]) == 0
    assert "names an eos_token_id, so that nothing says where its texts end" in capsys.readouterr().out
