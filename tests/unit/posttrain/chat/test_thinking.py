"""Answers with and without reasoning in one model: ids of both, the switches, and the prompts that ask for each."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.chat_format import ChatFormat, jinja_template
from posttrain.chat.dialogues import read_dialogues
from posttrain.chat.format_interface import Chat
from posttrain.chat.messages import BrokenDialogue
from posttrain.chat.template_format import TemplateFormat
from posttrain.chat.thinking import with_switches
from pretrain.generation.text_codec import TextCodec
from tests.chat_templates import QWEN3
from tests.chat_templates import write as write_tokenizer

EMPTY = "<think>\n\n</think>\n"
QWEN2_SPLIT = (  # as in Qwen's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ANSWERS = ["1234", " 1 2", "\n\n  a\n", "你好 😀", "<think> no", "", "\tx"]


@pytest.fixture(params=["own", "qwen3"])
def format_and_codec(
    request: pytest.FixtureRequest, chat: ChatFormat, tokenizer_file: Path, tmp_path: Path
) -> tuple[Chat, TextCodec]:
    """A chat format, and what `trivium chat` encodes dialogues with for a model that was trained in it."""
    if request.param == "own":
        return chat, TextCodec(tokenizer_file, jinja_template())
    folder = write_tokenizer(tmp_path / "tokenizer", QWEN3)
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.save(str(folder / "tokenizer.json"))
    return TemplateFormat(Tokenizer.load(folder), QWEN3), TextCodec(folder / "tokenizer.json", QWEN3)


def learnt(chat: Chat, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Returns the ids of the last sample of a dialogue, and those of them that are learnt."""
    sample = chat.samples(with_switches(messages, add=False))[-1]
    return sample.tokens.tolist(), sample.tokens[sample.answer].tolist()


@pytest.mark.parametrize("text", ANSWERS)
def test_prompts_of_chat_are_what_answers_of_each_kind_are_trained_after(
    format_and_codec: tuple[Chat, TextCodec], text: str
) -> None:
    chat, codec = format_and_codec
    user = {"role": "user", "content": "Sort 4213 /no_think"}
    silent, own = learnt(chat, [user, {"role": "assistant", "content": text}])
    open_ended = codec.encode_chat([user])
    assert silent[: len(open_ended)] == open_ended and silent[len(open_ended) :][: len(own)] == own
    codec.check_thinking(False)
    prompt = codec.encode_chat([user])  # of --no-think: the block is in the prompt
    block = prompt[len(open_ended) :]
    assert silent[: len(prompt)] == prompt and own[: len(block)] == block and len(block) > 1
    assert chat.decode_answer(own) == text.lstrip("\n" if isinstance(chat, TemplateFormat) else None)

    user["content"] = "Sort 4213 /think"
    codec.check_thinking(True)
    prompt = codec.encode_chat([user])  # of --think: the model opens the block
    thought, own = learnt(chat, [user, {"role": "assistant", "content": text, "reasoning_content": "4 > 2"}])
    assert thought[: len(prompt)] == prompt and thought[len(prompt) :][: len(own)] == own
    assert own[: len(block)] != block
    assert chat.decode_answer(own).startswith("<think>\n4 > 2\n</think>")


def test_the_own_template_gives_the_ids_of_the_own_format(chat: ChatFormat, tokenizer_file: Path) -> None:
    codec = TextCodec(tokenizer_file, jinja_template())
    for reasoning in ("", "because", "\n a<|end|> \n\n"):
        for text in ANSWERS:
            turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": text}]
            turns[1]["reasoning_content"] = reasoning
            dialogue = [*turns, *turns]
            [rendered], _ = render_jinja_template([dialogue], chat_template=jinja_template())
            tokens, answer = chat.render(dialogue)  # type: ignore[arg-type]
            assert codec.encode_rendered(rendered) == tokens.tolist()
            ours = chat.tokenizer.decode(tokens[answer].tolist())
            assert ours.startswith(EMPTY if reasoning == "" else "<think>\n")
            shorter, _ = chat.render(turns)  # type: ignore[arg-type]
            assert tokens[: len(shorter)].tolist() == shorter.tolist()  # a dialogue begins with its beginnings


TALK = {
    "thought": [("user", "why?"), ("because", "so it is")],
    "plain": [("user", "why?"), ("", "so it is")],
    "both": [("user", "why?"), ("because", "so it is"), ("user", "and?"), ("", "no")],
}


def dialogue(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": text}
        if kind == "user"
        else {"role": "assistant", "content": text, **({"reasoning_content": kind} if kind else {})}
        for kind, text in turns
    ]


def test_dialogues_without_a_switch_get_the_one_that_fits() -> None:
    asked = {
        name: [m["content"] for m in with_switches(dialogue(turns), add=True) if m["role"] == "user"]
        for name, turns in TALK.items()
    }
    assert asked == {
        "thought": ["why? /think"],
        "plain": ["why? /no_think"],
        "both": ["why? /think", "and? /no_think"],
    }
    silent = with_switches(dialogue(TALK["both"]), add=True)
    assert [m.get("reasoning_content") for m in silent] == [None, "because", None, ""]
    for turns in TALK.values():
        assert with_switches(dialogue(turns), add=False) == dialogue(turns)
    own = dialogue([("user", "why? /no_think"), ("", "so"), ("user", "and?"), ("", "<think>\n\n</think>\n\nno")])
    found = with_switches(own, add=True)
    assert [m["content"] for m in found] == [m["content"] for m in own]  # it has switches of its own
    assert [m.get("reasoning_content") for m in found] == [None, "", None, None]  # no second block


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([("user", "why? /no_think"), ("because", "so")], "an answer to /no_think that has reasoning"),
        ([("user", "why? /think"), ("", "so")], "an answer to /think that has no reasoning"),
        ([("user", "a /no_think"), ("", "b"), ("user", "c"), ("d", "e")], "an answer to /no_think that has reasoning"),
        ([("user", "/think"), ("", "<think>\n</think>so")], "an answer to /think that has no reasoning"),
    ],
)
def test_an_answer_that_does_not_follow_the_switch_is_set_aside(
    chat: ChatFormat, tmp_path: Path, turns: list[tuple[str, str]], said: str
) -> None:
    with pytest.raises(BrokenDialogue) as raised:
        with_switches(dialogue(turns), add=False)
    assert raised.value.rule == said
    good = [dialogue(turns) for turns in TALK.values()]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"messages": one}) for one in [*good, dialogue(turns)]))
    found = read_dialogues([str(path)], chat, 128, 0.0, 1.0, switches=True)
    assert found.set_aside.counts == {f"bad_messages: {said}": 1} and len(found.train) == 3
    read = dialogue(turns)
    read[-1]["train"] = False
    assert len(with_switches(read, add=False)) == len(turns)  # it is not learnt


def test_reasoning_that_is_no_text_is_refused(chat: ChatFormat) -> None:
    for key in ("reasoning_content", "thinking", "reasoning"):
        broken = dialogue(TALK["plain"])
        broken[1][key] = ["because"]
        with pytest.raises(BrokenDialogue, match=f"no text in '{key}', which is list"):
            chat.samples(broken)
        broken[1][key] = "because"
        assert "because" in chat.tokenizer.decode(chat.samples(broken)[0].tokens.tolist())
