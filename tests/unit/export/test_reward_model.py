"""Reward models as transformers' classes for sequence classification, and back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.model_parts import AttentionConfig
from export import generate, huggingface, import_hf, reloading
from export.model_source import open_source
from export.publishing import RECORD
from tests.tiny_models import tiny, write_imported


@pytest.mark.parametrize(
    ("change", "name", "outputs"),
    [
        ({}, "Llama", 1),
        ({"attention": AttentionConfig(qkv_bias=True)}, "Qwen2", 3),
        ({"attention": AttentionConfig(qk_norm="head")}, "Qwen3", 2),
        ({"attention": AttentionConfig(pattern="sliding", window=7)}, "Mistral", 1),
    ],
)
def test_scores_are_the_same_in_transformers_and_come_back_bit_for_bit(
    tokenizer_path: Path, tmp_path: Path, change: dict[str, AttentionConfig], name: str, outputs: int
) -> None:
    config = ModelConfig(**dict(tiny().with_values(outputs)) | change)
    write_imported(tmp_path / "ours", config, tokenizer_path)
    argv = ["configs/export/demo.toml", f"run={tmp_path / 'ours'}", f"out={tmp_path / 'out'}"]
    assert huggingface.main(argv) == 0
    measured = json.loads((tmp_path / "out" / RECORD).read_text())["checks"]["scores, max difference"]
    assert re.search(r"over \d+ texts, one by one and in a batch$", measured)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(model).__name__ == f"{name}ForSequenceClassification" and model.num_labels == outputs
    assert model.config.pad_token_id == 3
    assert import_hf.main([str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    before, after = open_source(tmp_path / "ours"), open_source(tmp_path / "back")
    assert after.model.head == before.model.head
    ours, theirs = before.read(), after.read()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_reward_model_of_transformers_keeps_its_labels_through_import_and_export(
    tokenizer_path: Path, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 800, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    config = transformers.Qwen2Config(**sizes, **labels, tie_word_embeddings=True, pad_token_id=3)
    transformers.Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "hub")
    (tmp_path / "hub/tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    assert import_hf.main([str(tmp_path / "hub"), str(tmp_path / "ours")]) == 0
    argv = ["configs/export/demo.toml", f"run={tmp_path / 'ours'}", f"out={tmp_path / 'out'}"]
    assert huggingface.main(argv) == 0
    found = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert found.id2label == labels["id2label"]


def test_a_reward_model_writes_no_text(tokenizer_path: Path, tmp_path: Path) -> None:
    folder = write_imported(tmp_path / "ours", tiny().with_values(), tokenizer_path)
    with pytest.raises(ConfigError, match="is a reward model, which writes no text"):
        generate.main([str(folder), "--prompt", "a"])


def test_scores_that_change_with_padding_are_told_and_not_published(
    tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_imported(tmp_path / "ours", tiny().with_values(), tokenizer_path)
    original = reloading.reload

    def changed(*args: Any, **keys: Any) -> reloading.Reloaded:
        """Returns a model whose scores are higher by one in a batch of several rows."""
        hf = original(*args, **keys)
        hf.model.score.register_forward_hook(lambda module, given, scores: scores + (len(scores) > 1))
        return hf

    monkeypatch.setattr(reloading, "reload", changed)
    argv = ["configs/export/demo.toml", f"run={tmp_path / 'ours'}", f"out={tmp_path / 'out'}"]
    assert huggingface.main(argv) == 1
    assert re.search(r"in a batch padded with token 3, \S+ one by one", " ".join(capsys.readouterr().out.split()))
    assert not (tmp_path / "out").exists()
