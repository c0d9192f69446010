"""Prompts that a run continues at its evaluations: those that do not fit are refused, with what would fit."""

from pathlib import Path

import pytest

from configs.loader import ConfigError, validate
from configs.train import EvalConfig
from pretrain.evaluation.text_samples import TextSamples
from pretrain.generation.text_codec import TextCodec
from tests.foreign_tokenizers import gpt2, write
from tests.remedies import remedies

CONTEXT = 20


def test_a_prompt_and_its_continuation_fit_as_the_message_says(tmp_path: Path) -> None:
    codec = TextCodec(write(tmp_path, *gpt2()) / "tokenizer.json")
    texts = ["It was", "It was a dark night."]
    longest = max(len(codec.encode_prompt(text)) for text in texts)

    def make(texts: list[str], tokens: int) -> TextSamples:
        config = validate(EvalConfig, {"prompts": texts, "prompt_tokens": tokens})
        return TextSamples(config, codec, CONTEXT, tmp_path, lambda: 0)

    with pytest.raises(ConfigError, match=rf"'It was a dark night.' has {longest} tokens, .* = 300 more") as refused:
        make(texts, 300)
    ((_, fewer),) = remedies(str(refused.value))
    make(texts, int(fewer))
    with pytest.raises(ConfigError):
        make(texts, int(fewer) + 1)
    with pytest.raises(ConfigError, match=r" that the model reads; shorten it$"):
        make([texts[1] * 9], 1)
