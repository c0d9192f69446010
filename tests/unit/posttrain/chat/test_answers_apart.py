"""Answers whose first characters would share a token with the prompt: what is learnt begins with the prompt's ids."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat import mask_xray
from posttrain.chat.dialogues import read_dialogues
from posttrain.chat.messages import BrokenDialogue
from posttrain.chat.template_format import TemplateFormat
from posttrain.preference.preference_pairs import rendered_answer
from tests.chat_templates import CHATML, unmarked, write
from tests.foreign_tokenizers import t5
from tests.foreign_tokenizers import write as write_foreign

SPACED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ASKED, LAST = {"role": "user", "content": "a"}, {"role": "assistant", "content": "d"}
# With CHATML's line break, or a space, before it, each is joined to the prompt by one of the two templates at least.
JOINED = ("self.x", "\n\ndef f", "    return 5", "\n  ", "  ", "\n", "is\u00a0it")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write(tmp_path_factory.mktemp("apart"), CHATML))


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("template", [SPACED, CHATML, unmarked(CHATML)], ids=["spaced", "marked", "chatml"])
def test_what_is_learnt_follows_the_ids_of_the_prompt(tokenizer: Tokenizer, template: str) -> None:
    chat, apart = TemplateFormat(tokenizer, template), 0
    for text in (*JOINED, "x"):
        turns = [ASKED, said(text), ASKED, said(text)]
        for sample, upto in zip(chat.samples(turns[:2]) + chat.samples(turns)[-1:], (1, 3), strict=True):
            prompt = chat.render_prompt(turns[:upto])
            begin = len(prompt) if sample.unstable or upto == 1 else int(sample.answer.argmax())
            assert sample.tokens[:begin].tolist() == prompt[:begin] and sample.answer[begin]
            assert begin == len(prompt) or not sample.unstable
            assert chat.decode_answer(sample.tokens[len(prompt) :].tolist()) == text
            assert sample.unprompted is None
        assert len(chat.samples(turns)) == (2 if sample.unstable else 1)
        apart += sample.unstable is not None
        pair = rendered_answer(chat, [ASKED], [said(text)])
        assert pair.tokens[: int(pair.answer.argmax())].tolist() == chat.render_prompt([ASKED])
    assert 2 <= apart < len(JOINED) + 1, "both kinds of answers are tried"


def test_the_mask_x_ray_says_what_is_encoded_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, chat = tmp_path / "dialogues.jsonl", TemplateFormat(tokenizer, CHATML)
    path.write_text("".join(json.dumps({"messages": [ASKED, said(text)]}) + "\n" for text in ("d", "\nx")))
    found = mask_xray.describe({"dialogues": read_dialogues([str(path)], chat, 64, 0.0, 0.0)}, chat, 1)
    said_of_it = mask_xray.printed(found, colours=False)
    why = (
        r"'assistant\n' before message 1 and '\nx<|im_end' in it have other tokens in one piece; they are encoded "
        "apart, as a model that is prompted reads and writes them"
    )
    assert f"unstable: {why}" in said_of_it and "assistant\n{+\nx<|im_end|>+}" in said_of_it
    assert f"1 unstable (first: {path}:2, {why})" in said_of_it
    assert mask_xray.instability(found["sources"]["dialogues"]) in said_of_it


def test_an_answer_that_cannot_be_encoded_apart_is_set_aside(tmp_path: Path) -> None:
    """Tries a tokenizer that puts a space before every text; the message's remedy is followed."""
    made, files = t5()
    spaced = SPACED.replace(":", "")
    chat = TemplateFormat(Tokenizer.load(write_foreign(tmp_path / "t5", made, files)), spaced)
    dialogue = [ASKED, said("def")]
    with pytest.raises(
        BrokenDialogue,
        match=r"'assistant ' before message 1 and 'def</s>' in it share a token, and the tokenizer writes a space more "
        r"where they are apart; let the prompt end without white space, and the answer begin with it",
    ):
        chat.samples(dialogue)[-1].to_write()
    chat = TemplateFormat(chat.tokenizer, spaced.replace("assistant {%", "assistant{%"))
    sample, prompt = chat.samples(dialogue)[-1].to_write(), chat.render_prompt([ASKED])
    assert sample.tokens[: len(prompt)].tolist() == prompt and sample.answer[len(prompt)]
