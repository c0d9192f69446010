"""Fixtures of the export tests: a small real tokenizer, and a tiny random model with its export."""

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from configs.export import ExportConfig
from export import huggingface
from export.checked_texts import read_texts
from pretrain.model import Decoder, build_single
from tests.tiny_models import make_source, random_weights, tiny, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the tokenizer that `train_tokenizer` makes."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    """Decoder of the tiny dense model with random weights."""
    return build_single(tiny(), random_weights(tiny()))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    """Hugging Face folder of the tiny dense model, exported without a chat template."""
    out = tmp_path_factory.mktemp("exported") / "model"
    config = ExportConfig(run="unused", out=str(out), prompts=["It was"], chat_prompts=["a"], sample_tokens=1)
    source, console = make_source(tiny(), random_weights(tiny()), tokenizer_path), Console(file=io.StringIO())
    texts = read_texts(source, config, console)
    assert huggingface.export(source, texts, config, out, {}, console) == 0
    return out
