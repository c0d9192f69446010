"""Rejection sampling: which completions are kept, how the others are counted, and files that a run goes on from."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.loader import ConfigError, validate
from configs.sample import KeepSection, SampleConfig
from launch.recipe_results import describe_samples, measurement
from posttrain.chat.chat_format import ChatFormat
from posttrain.rejection.keeping import NotKept, kept_of_prompt
from posttrain.rejection.kept_dialogues import publish
from posttrain.rejection.prompts import open_prompts
from posttrain.rejection.samples import DrawnSample, SampleFiles, check_facts
from posttrain.rejection.text_measures import longest_paragraph, repeated_share
from posttrain.rewards.script import script_share

LONG = "the quick brown fox jumps over the lazy dog while seven wizards brew a potion"
PROMPTS: dict[str, Any] = {"kind": "file", "files": ["x"], "answer_key": ""}
ONE = DrawnSample(0, "sort/21", 0, "12", 3, True, 0.0, 1.0, "right")


def config(tmp_path: Path, **more: Any) -> SampleConfig:
    tree: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run")},
        "init": {"run": "x"},
        "task": {"digits": 3},
        "sample": {"problems": 6, "completions": 2, "part": 2},
    }
    return validate(SampleConfig, tree | more)


def chosen(samples: list[DrawnSample], **keep: Any) -> tuple[list[int], dict[str, int]]:
    """Returns the numbers of the samples that are kept, and the counts of the others."""
    set_aside = NotKept()
    kept = kept_of_prompt(samples, KeepSection(**keep), True, lambda sample: None, set_aside)
    assert len(kept) + set_aside.counts.total() == len(samples)
    assert set_aside.first.keys() == set_aside.counts.keys()
    return [sample.number for sample in kept], dict(set_aside.counts)


@pytest.mark.parametrize(
    ("change", "keep", "reason"),
    [
        ({"stopped": False}, {}, "cut before the end of its turn"),
        ({"text": " \n"}, {}, "empty"),
        ({"score": None, "reason": "hangs"}, {}, "unscorable: hangs"),
        ({"score": 0.5}, {"min_score": 1}, "score below keep.min_score = 1"),
        ({"rewards": {"form": 0.0}}, {"min_rewards": {"form": 1}}, "reward below keep.min_rewards.form = 1"),
        ({}, {"min_rewards": {"form": 1}}, "reward below keep.min_rewards.form = 1"),
        ({"tokens": 1}, {"min_tokens": 2}, "shorter than keep.min_tokens = 2"),
        ({"tokens": 9}, {"max_tokens": 8}, "longer than keep.max_tokens = 8"),
        ({"repeated": 0.6}, {"max_repeated": 0.5}, "repetition above keep.max_repeated = 0.5"),
        ({"text": "so 答案是 12"}, {"min_script": 0.9}, "mixed scripts, below keep.min_script = 0.9"),
        ({"text": "a\n\n" + "b" * 9}, {"max_paragraph": 8}, "a paragraph longer than keep.max_paragraph = 8"),
        ({"text": "```py\n1```"}, {"code_blocks": False}, "a block of code, and keep.code_blocks = false"),
    ],
)
def test_each_rule_sets_aside_what_breaks_it_and_nothing_else(
    change: dict[str, Any], keep: dict[str, Any], reason: str
) -> None:
    good, bad = replace(ONE, number=1, rewards={"form": 1.0}), replace(ONE, **change)
    assert chosen([bad, good], **keep) == ([1], {reason: 1})
    # Where nothing is kept, the message names the rule to loosen, or what else to do about it.
    set_aside = NotKept()
    set_aside.add(reason, bad)
    said = set_aside.remedy()
    if keep:
        (rule,) = keep
        assert re.match(rf"loosen keep\.{rule}(\.form)? and run the same command again", said)
        assert chosen([bad]) == ([0], {})
    else:
        assert "keep" not in said and "another run.dir" in said
        assert "task.max_new_tokens" in said or bad.stopped


def test_the_best_of_a_prompt_come_first_and_equal_texts_count_once() -> None:
    texts, scores = ("a", "b ", "b", "c", "d"), (0.5, 1.0, 0.9, 1.0, 0.7)
    samples = [replace(ONE, number=i, text=t, score=s) for i, (t, s) in enumerate(zip(texts, scores, strict=True))]
    equal = {"equal to a better one of its prompt": 1}
    assert chosen(samples) == ([1, 3, 4, 0], equal)
    assert chosen(samples, per_prompt=2) == ([1, 3], equal | {"beyond keep.per_prompt = 2": 2})


def test_near_duplicates_of_better_ones_are_set_aside() -> None:
    texts = (LONG, LONG.upper() + "!", LONG + " tonight", "12", "13", "another story of a fox that sleeps all day")
    samples = [replace(ONE, number=i, text=text) for i, text in enumerate(texts)]
    assert chosen(samples) == ([0, 1, 2, 3, 4, 5], {})
    near = {"near-duplicate of a better one of its prompt": 2}
    assert chosen(samples, near_duplicates=0.8) == ([0, 3, 4, 5], near)  # 11 of 12 n-grams are the same
    assert chosen(samples, near_duplicates=0.95)[0] == [0, 2, 3, 4, 5]


def test_measures_of_texts() -> None:
    assert repeated_share([1, 2, 3] * 4) == pytest.approx(2 / 5)  # 5 runs of 8 tokens, of which 3 differ
    assert repeated_share([1] * 7) == 0 and repeated_share(range(50)) == 0
    assert script_share("1+1=2") == 1 and script_share("ab 答案") == 0.5
    assert script_share("東京へ行きます") == 1 and script_share("Ünïcode") == 1
    assert longest_paragraph("ab\nc\n \nd") == 4 and longest_paragraph("") == 0


def sampled(settings: SampleConfig, chat: ChatFormat) -> tuple[Any, SampleFiles]:
    """Returns the prompts and files of a run whose first completion of each prompt is right."""
    prompts = open_prompts(settings, chat, 64)
    files = SampleFiles(Path(settings.run.dir), len(prompts.items), 2, 2)
    for part, numbers in enumerate(files.parts):
        for_part = []
        for prompt in prompts.items[numbers.start : numbers.stop]:
            right = DrawnSample(prompt.number, prompt.problem.id, 0, str(prompt.problem.answer), 4, True, 0.0, 1.0)
            for_part += [right, replace(right, number=1, text="\ud800<|end|>", score=0.0, reason="wrong")]
        files.write(part, for_part)
    return prompts, files


FACTS = {"model": {"sha256": "abc", "path": "x"}, "seed": 1}


def test_what_is_published_is_a_function_of_samples_and_filters(tmp_path: Path, chat: ChatFormat) -> None:
    settings = config(tmp_path, keep={"min_score": 1})
    prompts, files = sampled(settings, chat)
    counts, _ = publish(settings, files, prompts, chat, FACTS, 64)
    written = {path.name: path.read_bytes() for path in files.folder.parent.glob("*.json*")}
    record = json.loads(written["sample.json"])
    assert measurement(tmp_path / "run", "kept_share") == 0.5
    assert describe_samples(tmp_path / "run") == ("12 samples of 6 prompts", "6 kept, of 6 prompts\nmean score 0.50")
    lines = [json.loads(line) for line in written["dialogues.jsonl"].splitlines()]
    assert counts.kept == len(lines) == record["measures"]["kept"] == record["dialogues"]["number"] == 6
    assert record["measures"]["score"] == 0.5 and record["measures"]["best_score"] == 1
    assert record["set_aside"]["score below keep.min_score = 1"]["number"] == 6
    problem = prompts.items[0].problem
    assert lines[0] == {
        "id": f"{problem.id}#0",
        "messages": [*problem.messages, {"role": "assistant", "content": problem.answer}],
        "score": 1.0,
        "prompt_id": problem.id,
        "sample": 0,
        "seed": 1234,
        "model": "abc",
    }
    publish(settings, files, prompts, chat, FACTS, 64)
    assert written == {path.name: path.read_bytes() for path in files.folder.parent.glob("*.json*")}


def test_what_no_dialogue_can_hold_is_set_aside(tmp_path: Path, chat: ChatFormat) -> None:
    settings = config(tmp_path)
    prompts, files = sampled(settings, chat)
    _, set_aside = publish(settings, files, prompts, chat, FACTS, 64)
    assert dict(set_aside.counts) == {"no dialogue: text that cannot be encoded": 6}
    _, set_aside = publish(settings, files, prompts, chat, FACTS, 4)
    assert set_aside.counts["no dialogue: longer than the model's context"] == 6


def test_a_run_goes_on_with_the_parts_that_are_missing(tmp_path: Path, chat: ChatFormat) -> None:
    _, files = sampled(config(tmp_path), chat)
    assert files.missing() == [] and len(files.parts) == 3
    files.path(1).unlink()
    assert files.missing() == [1]
    assert SampleFiles(tmp_path / "run", 7, 2, 2).missing() == [1, 3]
    assert SampleFiles(tmp_path / "run", 5, 2, 2).missing() == [1, 2]  # the last part has fewer prompts now
    damaged = files.path(0).read_bytes().replace(b"right", b"wrong").replace(b"1.0", b"0.0")
    files.path(0).write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"part_000000.jsonl does not match its own SHA-256.* remove it"):
        list(files.by_prompt())


def test_samples_that_were_drawn_otherwise_are_not_mixed(tmp_path: Path) -> None:
    before = {"seed": 1, "problems": 5, "model": {"sha256": "a", "path": "old"}}
    check_facts(tmp_path, before, {"seed": 1, "problems": 9, "model": {"sha256": "a", "path": "moved"}})
    with pytest.raises(ConfigError, match=r"seed 1 -> 2.*choose another run\.dir"):
        check_facts(tmp_path, before, before | {"seed": 2})
    old, new = "a" * 64, "b" * 64
    before = {"model": {"sha256": old, "path": "one"}, "tokenizer": old, "chat_template": old, "rewards": {"f": old}}
    for changed, words in (
        ({"model": {"sha256": new, "path": "two"}}, "model one -> two"),
        ({"model": {"sha256": new, "path": "one"}}, "the model one has another content"),
        ({"tokenizer": new}, "the tokenizer has another content"),
        ({"chat_template": None}, "the chat template has another content"),
    ):
        with pytest.raises(ConfigError, match=f"were drawn otherwise: {words}; undo the change, or choose another"):
            check_facts(tmp_path, before, before | changed)


def test_prompts_of_files_have_no_scores(tmp_path: Path, chat: ChatFormat) -> None:
    lines = [{"prompt": f"Say {i % 20}"} for i in range(25)] + [{"question": "no prompt"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    given = PROMPTS | {"files": [str(file)], "max_new_tokens": 8, "system_prompt": "Be brief."}
    found = open_prompts(config(tmp_path, task=given, sample={}), chat, 64)
    assert [prompt.problem.prompt for prompt in found.items] == [f"Say {i}" for i in range(20)]
    assert found.items[0].problem.messages[0] == {"role": "system", "content": "Be brief."}
    assert "20 prompts, set aside: 1 no key 'prompt'" in found.notes[0] and "5 repeated" in found.notes[0]
    with pytest.raises(ConfigError, match=r"1 of 21 problems .* task\.max_bad_share = 0\.0"):
        open_prompts(config(tmp_path, task=given | {"max_bad_share": 0}, sample={}), chat, 64)


def test_repeated_problems_are_asked_once(tmp_path: Path, chat: ChatFormat) -> None:
    found = open_prompts(config(tmp_path, sample={"problems": 900}), chat, 64)
    keys = {prompt.key for prompt in found.items}
    assert len(keys) == len(found.items) == 900 - found.repeated and found.repeated > 100
    with pytest.raises(ConfigError, match=r"sample\.problems is left out; set for example"):
        open_prompts(config(tmp_path, sample={}), chat, 64)


@pytest.mark.parametrize(
    ("more", "words", "right"),
    [
        (
            {"task": PROMPTS, "keep": {"min_score": 1}},
            r"keep\.min_score = 1\.0 needs scores.* leave the bound out",
            {"task": PROMPTS},
        ),
        (
            {"task": PROMPTS, "keep": {"min_rewards": {"a": 1}}},
            r"keep\.min_rewards = .*needs scores.*, or name rewards$",
            {"task": PROMPTS | {"rewards": {"a": {}}, "answer_key": "answer"}, "keep": {"min_rewards": {"a": 1}}},
        ),
        (
            {"sample": {"temperature": 0}},
            r"sample\.temperature = 0 are all the same; set sample\.completions=1",
            {"sample": {"temperature": 0, "completions": 1}},
        ),
        ({"sample": {"temperature": 0}}, r"or a temperature such as 1\.0$", {"sample": {"temperature": 1.0}}),
        ({"parallel": {"pp": 2}}, r"parallel\.pp = 2 is for training.*: leave the key out$", {"parallel": {}}),
        (
            {"keep": {"min_tokens": 9, "max_tokens": 8}},
            r"keep\.min_tokens = 9 is above keep\.max_tokens = 8.*swap them$",
            {"keep": {"min_tokens": 8, "max_tokens": 9}},
        ),
    ],
)
def test_settings_that_contradict_each_other_are_legal_once_they_are_as_the_message_says(
    tmp_path: Path, more: dict[str, Any], words: str, right: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **more)
    config(tmp_path, **right)
