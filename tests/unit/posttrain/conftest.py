"""A small real sentencepiece tokenizer with the chat format's control tokens, trained in a second."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece

from posttrain.chat import CONTROL_TOKENS, ChatFormat

TEXT = (
    "Sort the digits of 529143 and say hello. How are you today? I am fine, thank you; what is your name?\n"
    "def main(argv):\n    return 0\n你好，今天天气怎么样？我很好，谢谢。\n"
    "Call me Ishmael. < | > / s end user assistant system\n"
)


class PieceTokenizer:
    """sentencepiece behind the three methods that the chat format asks for."""

    def __init__(self, model: Path) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.vocab_size = self.processor.vocab_size()
        self.pad_id = self.processor.pad_id()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode(list(ids))

    def piece_to_id(self, piece: str) -> int:
        return self.processor.piece_to_id(piece)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PieceTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 20),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        control_symbols=list(CONTROL_TOKENS[4:]),
        minloglevel=2,
    )
    return PieceTokenizer(directory / "tokenizer.model")


@pytest.fixture(scope="session")
def chat(tokenizer: PieceTokenizer) -> ChatFormat:
    return ChatFormat(tokenizer)
