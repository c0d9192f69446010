"""Records that are set aside: the error says why, where the first one is, and what is wrong with that one."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.loader import validate
from configs.reward_model import RewardModelConfig
from configs.tasks import TaskConfig
from posttrain.chat.chat_format import ChatFormat
from posttrain.chat.dialogues import read_dialogues
from posttrain.preference.preference_pairs import read_pairs
from posttrain.reward_model.judged_examples import read_examples
from posttrain.tasks.verifiable_tasks import make_task
from tests.training_configs import BASES


def user(text: str = "name?", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def answer(text: str = "Ishmael", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
SIDES = {"chosen": [user(), answer("a")], "rejected": [user(), answer("b")]}


@pytest.mark.parametrize(
    ("kind", "record", "words"),
    [
        ("dialogues", {"messages": [user(), answer(train=2)]}, "a train that is neither 0 nor 1 (first: "),
        ("dialogues", {"messages": [user(weight=1), answer()]}, "weight on a message that is not the assistant's (fi"),
        ("dialogues", {"messages": [user(), answer(reasoning=3)]}, "no text in reasoning (first: "),
        (
            "dialogues",
            {"messages": [user(), answer()], "tools": [TOOL]},
            "Trivium's own chat format has no tools; ",
        ),
        ("dialogues", {"messages": [user(), answer(train=0)]}, "'train' or 'weight' leaves out every turn of the ass"),
        ("pairs", {"prompt": "a", "chosen": "b " * 99, "rejected": "c"}, " tokens in both sides"),
        (
            "pairs",
            {**SIDES, "rejected": [user("?"), answer()]},
            "the sides differ in message 0, which is not the as",
        ),
        (
            "pairs",
            {**SIDES, "chosen": [user(), answer("a", train=0)]},
            "a side has no turn of the assistant to train",
        ),
        ("process", {"prompt": "a", "steps": [], "labels": [1]}, "'steps' is [], not a list with something in it"),
        (
            "process",
            {"prompt": "a", "steps": ["b"], "labels": [7]},
            "label 7 is none of ['wrong', 'right'], nor a number from 0",
        ),
        ("task", {"prompt": "a", "answer": "no digit"}, "no match of answer_pattern in the answer"),
        (
            "task",
            {"prompt": [{"role": "system", "content": "a"}, user()], "answer": "1"},
            "and so has the task (first: ",
        ),
    ],
)
def test_the_reason_is_told(chat: ChatFormat, tmp_path: Path, kind: str, record: dict[str, Any], words: str) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="records") as refused:
        if kind == "dialogues":
            read_dialogues([str(file)], chat, 64, 0.0, 0.0)
        elif kind == "pairs":
            read_pairs([str(file)], chat, 64, 0.0, 0.0)
        elif kind == "process":
            data = {"files": [str(file)], "heldout_share": 0.0}
            config = validate(RewardModelConfig, BASES["rm"] | {"data": data, "reward_model": {"kind": "process"}})
            read_examples(config.data, config.reward_model, chat, 64)
        else:
            own = {"kind": "file", "files": [str(file)], "answer_pattern": "([0-9])", "system_prompt": "Be brief."}
            make_task(validate(TaskConfig, own))
    assert words in str(refused.value) and str(file) in str(refused.value)
