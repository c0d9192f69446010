"""Fixtures of the post-training tests: a small real tokenizer with the chat format's control tokens."""

from pathlib import Path

import pytest

from configs.tokenizer import TokenizerConfig
from data_pipeline.tokens.tokenizer import SENTENCEPIECE_FILE, Tokenizer
from data_pipeline.tokens.tokenizer_training import train
from posttrain.chat.chat_format import ChatFormat
from tests.shards import write_shard

TEXT = (
    "Sort the digits of 529143 and say hello. How are you today? I am fine, thank you; what is your name?\n"
    "def main(argv):\n    return 0\n你好，今天天气怎么样？我很好，谢谢。\n"
    "Call me Ishmael. < | > / s end user assistant system\n"
)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train(
        [write_shard(directory / "text.jsonl.zst", [{"text": TEXT * 20}])], directory, TokenizerConfig(vocab_size=400)
    )
    return directory / SENTENCEPIECE_FILE


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_file)


@pytest.fixture(scope="session")
def chat(tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)
