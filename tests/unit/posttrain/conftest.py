"""A small real tokenizer with the chat format's control tokens, trained in a second."""

import pytest

from data_pipeline.tokens.tokenizer import Tokenizer, train
from posttrain.chat_format import ChatFormat
from tests.shards import write_shard

TEXT = (
    "Sort the digits of 529143 and say hello. How are you today? I am fine, thank you; what is your name?\n"
    "def main(argv):\n    return 0\n你好，今天天气怎么样？我很好，谢谢。\n"
    "Call me Ishmael. < | > / s end user assistant system\n"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    train([write_shard(directory / "text.jsonl.zst", [{"text": TEXT * 20}])], directory, vocab_size=400)
    return Tokenizer.load(directory)


@pytest.fixture(scope="session")
def chat(tokenizer: Tokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)
