"""Answers and the prompts for them, by any template: what is learnt follows what a model is asked, and nothing else."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from configs.loader import ConfigError
from configs.reward_model import ExamplesConfig, RewardSection
from data_pipeline.tokens.foreign import template_in
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.dialogues import read_dialogues
from posttrain.chat.format_interface import Sample
from posttrain.chat.messages import BrokenDialogue
from posttrain.chat.template_format import TemplateFormat
from posttrain.preference.preference_examples import read_answers
from posttrain.preference.preference_pairs import Dialogue, read_pairs
from posttrain.reward_model.judged_examples import read_examples
from posttrain.rewards.attempt import Problem
from posttrain.tasks.lengths import longest_answer
from posttrain.tasks.sorting import SortTask
from posttrain.tasks.task import Split
from tests.chat_templates import CHATML, QWEN3, unmarked, write

THINKING = unmarked(CHATML).replace("assistant\\n' }}{% endif %}", "assistant\\n<think>\\n' }}{% endif %}")
ASKED, SAID, NEXT = (
    {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"))
)
LAST = {"role": "assistant", "content": "d"}
THOUGHT = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nd"}

PAIR = {"prompt": "a", "chosen": "d", "rejected": "e"}
KEPT = {"prompt": "a", "completion": "d", "label": True}


@pytest.fixture(scope="module")
def chat_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TemplateFormat]:
    tokenizer = Tokenizer.load(write(tmp_path_factory.mktemp("prompted"), CHATML))
    return lambda template: TemplateFormat(tokenizer, template)


def lines(folder: Path, *records: dict[str, Any]) -> list[str]:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [str(path)]


def learnt(chat: TemplateFormat, side: Sample | Dialogue) -> str:
    names = {number: name for name, number in chat.tokenizer.added_ids.items()}
    ids = side.tokens[side.answer].tolist()
    return b"".join((names.get(one) or "").encode() or chat.tokenizer.bytes_of(one) for one in ids).decode()


def test_answers_that_do_not_follow_their_prompt_are_set_aside(
    tmp_path: Path, chat_of: Callable[[str], TemplateFormat]
) -> None:
    """Tries a template of a reasoning model, whose prompts open a thinking block that its plain answers lack."""
    chat, paths = chat_of(THINKING), lines(tmp_path, {"messages": [ASKED, THOUGHT]}, {"messages": [ASKED, LAST]})
    found = read_dialogues(paths, chat, 64, heldout_share=0.0, max_bad_share=1.0)
    (kept,) = found.train
    assert learnt(chat, Sample(kept.tokens, kept.answer)) == "well\n</think>\n\nd<|im_end|>"
    assert f"does not follow its prompt (first: {paths[0]}:2, the prompt for message 1 " in str(found), str(found)
    assert "has '<think>\\n' where the dialogue has 'd<|im_end|>\\n'; let the template write" in str(found)
    pairs = lines(
        tmp_path,
        {"prompt": "a", "chosen": "d", "rejected": "e"},
        {"prompt": "a", "chosen": [THOUGHT], "rejected": [{**THOUGHT, "content": "<think>\n</think>\n\ne"}]},
    )
    assert [len(read_pairs(pairs, chat, 64, 0.0, 1.0, to_write=one).train) for one in (True, False)] == [1, 2]


@pytest.mark.parametrize("left", [[], [ASKED, SAID]])
def test_no_question_is_learnt_where_the_template_writes_prompts_otherwise(
    chat_of: Callable[[str], TemplateFormat], left: list[Any]
) -> None:
    cut = "{% for message in (messages[-1:] if add_generation_prompt else messages) %}"
    chat = chat_of(unmarked(CHATML).replace("{% for message in messages %}", cut))
    dialogue = [*left, NEXT, LAST]
    if not left:
        assert learnt(chat, chat.samples(dialogue)[-1].to_write()) == "d<|im_end|>"
        return
    with pytest.raises(BrokenDialogue, match=r"the prompt for message 3 has 'c.*where the dialogue has 'a"):
        chat.samples(dialogue)[-1].to_write()


def test_pairs_of_several_turns_are_read_by_a_template_that_writes_the_last_turn_otherwise(
    tmp_path: Path, chat_of: Callable[[str], TemplateFormat]
) -> None:
    """Tries Qwen3's, in which an answer has a thinking block while it is the last one."""
    turns, other = [ASKED, SAID, NEXT, LAST], {**LAST, "content": "e"}
    unlearnt = [{**turn, "train": False} if turn is SAID else turn for turn in turns]
    records: list[dict[str, Any]] = [
        {"prompt": turns[:3], "chosen": "d", "rejected": "e"},
        {"chosen": turns, "rejected": [*turns[:3], other]},
        {"prompt": unlearnt[:3], "chosen": "d", "rejected": "e"},
    ]
    for template in (QWEN3, CHATML):
        chat, begin = chat_of(template), "<think>\n\n</think>\n\n" if template is QWEN3 else ""
        found = read_pairs(lines(tmp_path, *records), chat, 128, 0.0, 0.0).train
        assert [learnt(chat, pair.chosen) for pair in found] == [f"{begin}d<|im_end|>"] * 3
        assert [learnt(chat, pair.rejected) for pair in found] == [f"{begin}e<|im_end|>"] * 3


def test_sides_that_leave_out_all_their_answers_are_set_aside(
    tmp_path: Path, chat_of: Callable[[str], TemplateFormat]
) -> None:
    chat, side = chat_of(CHATML), [{**LAST, "train": False}]
    pairs = read_pairs(lines(tmp_path, {"prompt": "a", "chosen": side, "rejected": "e"}, PAIR), chat, 64, 0.0, 1.0)
    answers = read_answers(
        lines(tmp_path, {"prompt": "a", "completion": side, "label": True}, KEPT), chat, 64, 0.0, 1.0
    )
    for found in (pairs, answers):
        assert found.set_aside.counts == {"no_answer": 1} and len(found.train) == 1, str(found)


def test_bytes_that_are_no_text_are_no_answer(tmp_path: Path, chat_of: Callable[[str], TemplateFormat]) -> None:
    path, pixels = tmp_path / "bytes.parquet", b"\xff\xd8"
    columns = {"prompt": ["a", "a"], "completion": ["é".encode(), pixels]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    found = read_dialogues([str(path)], chat := chat_of(CHATML), 64, heldout_share=0.0, max_bad_share=1.0)
    assert [learnt(chat, Sample(one.tokens, one.answer)) for one in found.train] == ["é<|im_end|>"]
    assert found.set_aside.counts == {"bad_completion": 1}


def test_a_message_that_the_template_drops_whole_is_set_aside(chat_of: Callable[[str], TemplateFormat]) -> None:
    """Tries a template that writes nothing for a message with calls, so that no end of a turn follows it either."""
    chat = chat_of(
        "{% for m in messages %}{% if not m.tool_calls %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "adds", "arguments": {}}]}
    with pytest.raises(BrokenDialogue, match=r"a tool call of message 1 \(assistant\): 'adds'"):
        chat.samples([ASKED, call, {"role": "tool", "content": "2"}, LAST])


def test_tools_of_a_pair_are_rendered(tmp_path: Path, chat_of: Callable[[str], TemplateFormat]) -> None:
    tools = [{"type": "function", "function": {"name": "adds_numbers"}}]
    for template, kept in ((QWEN3, 1), (CHATML, 0)):
        found = read_pairs(lines(tmp_path, {**PAIR, "tools": tools}, PAIR), chat_of(template), 999, 0.0, 1.0)
        texts = [found.train[i].chosen.tokens for i in range(kept)]
        assert all("adds_numbers" in chat_of(template).tokenizer.decode(one.tolist()) for one in texts)
        assert found.set_aside.counts == ({} if kept else {"bad_messages: text that the template drops": 1})


@pytest.mark.parametrize("turns", [[ASKED], [ASKED, SAID], [ASKED, SAID, NEXT]])
def test_a_classifier_reads_the_whole_dialogue_whoever_speaks_last(
    tmp_path: Path, chat_of: Callable[[str], TemplateFormat], turns: list[Any]
) -> None:
    chat, classes = chat_of(CHATML), RewardSection(kind="classification", labels=("good", "bad"))
    (path,) = lines(tmp_path, {"messages": turns, "label": "bad"})
    ((segment,),) = read_examples(ExamplesConfig(files=(path,), heldout_share=0.0), classes, chat, 64).train
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    assert segment.tokens.tolist() == chat.encoder.encode(text)[0] and segment.loss_mask.nonzero()[0].tolist() == [
        len(segment.tokens) - 1
    ]
    cut = chat_of(CHATML.replace("message['content']", "message['content'].lstrip('c')"))
    whole = read_examples(ExamplesConfig(files=(path,), heldout_share=0.0, max_bad_share=1.0), classes, chat, 64)
    assert len(whole.train) == 1
    if turns[-1] is NEXT:
        with pytest.raises(ValueError, match=r"text that the template drops .* content of message 2 \(user\): 'c'"):
            read_examples(ExamplesConfig(files=(path,), heldout_share=0.0), classes, cut, 64)


def test_a_right_answer_that_the_template_does_not_write_has_the_length_of_its_text(
    chat_of: Callable[[str], TemplateFormat],
) -> None:
    """Tries a template that leaves reasoning out of answers, as DeepSeek-R1's does; a model may still write it."""

    class Thought(SortTask):
        def problem(self, seed: int, split: Split, index: int) -> Problem:
            return replace(super().problem(seed, split, index), solution="<think>\nwell\n</think>\n123")

    chat = chat_of(unmarked(CHATML).replace("message['content']", "message['content'].split('</think>')[-1]"))
    assert longest_answer(Thought(3, 40), chat, 0, 2, 0) == len(chat.encode_text("<think>\nwell\n</think>\n123")) + 1


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ([{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}], "a"),
        ([{"name": "tool_use", "template": "b"}], None),
        ([5, {"name": "default", "template": 5}], None),
        ({"default": "a"}, None),
    ],
)
def test_of_several_templates_the_default_one_is_taken(tmp_path: Path, named: Any, found: str | None) -> None:
    assert template_in(tmp_path, {"chat_template": named}) == found


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes("café".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is not UTF-8 .*; fetch it again"):
        template_in(tmp_path, {})
