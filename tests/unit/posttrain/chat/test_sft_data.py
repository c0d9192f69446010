"""SFT rows: document masks, loss on answers only, a reproducible order, and dialogues that are refused or set aside."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.loader import ConfigError, validate
from configs.mixture import PlanConfig
from configs.sft import FineTuningData
from data_pipeline.mixture.plan_files import build_plan
from data_pipeline.mixture.rows import Plan
from data_pipeline.tokens.store import build
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.chat_format import ChatFormat, check_supervision
from posttrain.chat.dialogues import Example, read_dialogues
from posttrain.chat.sft_data import SFTSource, TextShare, pack
from posttrain.pretraining_text import PretrainingText
from posttrain.records import Records
from posttrain.tasks.demonstrations import demonstrations
from posttrain.tasks.sorting import SortTask
from pretrain.checkpoint.resume import check_identity
from tests.shards import write_shard

LENGTH = 64
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def dialogue(*texts: str) -> dict[str, Any]:
    return {
        "id": texts[0],
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)],
    }


def write(path: Path, records: list[Any]) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return str(path)


def examples(chat: ChatFormat, count: int = 40) -> list[Example]:
    found = []
    for i in range(count):
        turns = ["How are you " + "today " * (i % 5), f"I am fine {i}", "hello", "thank you"][: 2 + 2 * (i % 2)]
        tokens, answer = chat.render(dialogue(*turns)["messages"])
        found.append(Example(str(i), tokens, answer))
    return found


def test_packed_rows_hold_every_example_once_behind_its_own_mask(chat: ChatFormat) -> None:
    originals = examples(chat)
    rows = pack(originals, LENGTH, chat.ids["<pad>"], source=3)
    assert len(rows) < len(originals) / 1.5  # several examples share a row
    seen = []
    for row in rows:
        assert row.source == 3 and row.tokens.shape == (LENGTH,)
        assert (row.tokens[row.segments < 0] == chat.ids["<pad>"]).all()
        assert not row.loss_mask[row.segments < 0].any()
        for segment in range(row.segments.max() + 1):
            (where,) = np.nonzero(row.segments == segment)
            assert row.positions[where].tolist() == list(range(len(where)))
            tokens, mask, labels = row.tokens[where], row.loss_mask[where], row.labels[where]
            assert not mask[-1]  # the last token of a document has no label
            assert (labels[:-1][mask[:-1]] == tokens[1:][mask[:-1]]).all()
            seen.append((tokens.tolist(), [False, *mask[:-1].tolist()]))
    expected = [(e.tokens.tolist(), e.answer.tolist()) for e in originals]
    assert sorted(seen) == sorted(expected)


def test_sample_i_is_a_function_of_data_seed_and_i(chat: ChatFormat) -> None:
    def source(seed: int) -> SFTSource:
        found = {"a": Records("dialogues", examples(chat)), "b": Records("dialogues", examples(chat, 9))}
        return SFTSource(found, LENGTH, chat.ids["<pad>"], seed)

    first, again, other = source(1), source(1), source(2)
    epoch = first.rows_per_epoch
    whole = first.rows(range(3 * epoch))
    backwards = [again.rows(range(i, i + 1))[0] for i in reversed(range(3 * epoch))][::-1]
    for row, same in zip(whole, backwards, strict=True):
        assert row.tokens.tolist() == same.tokens.tolist() and row.source == same.source
    epochs = [[row.tokens.tobytes() for row in whole[k * epoch : (k + 1) * epoch]] for k in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])  # every row once per epoch
    assert epochs[0] != epochs[1] != epochs[2]  # each epoch in another order
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.difference(first.facts).startswith("the checkpoint does not say")
    assert other.difference(first.facts).startswith("a differs in content, with 40 examples as before; b differs")
    assert {row.source for row in whole} == {0, 1}


@pytest.fixture(scope="module")
def plan(tokenizer_file: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan of two sources of pretraining text with rows of LENGTH tokens."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("prose", "code"):
        documents = [{"text": f"{name}: how are you today? " * 9, "id": str(i), "metadata": {}} for i in range(6)]
        shard = write_shard(folder / f"{name}.jsonl.zst", documents)
        for split in ("train", "heldout"):
            build(shard, folder / "tokens" / split / name / "00000", tokenizer)
    settings = PlanConfig(seq_length=LENGTH, samples=7, seed=1, weights={"prose": 2.0, "code": 1.0}, max_epochs=9)
    build_plan(folder / "tokens", tokenizer_file.parent, folder / "plan", settings)
    return Plan.open(folder / "plan")


def test_a_run_whose_dialogues_are_others_is_refused_in_words(chat: ChatFormat, plan: Plan) -> None:
    """Resumes on other dialogues: the keys that decide the data are named, and no hash is shown."""
    pad, text = chat.ids["<pad>"], TextShare(PretrainingText(plan, "data.text_plan"), 0.5)

    def source(count: int, text: TextShare | None = None) -> SFTSource:
        return SFTSource({"dialogues": Records("dialogues", examples(chat)[:count])}, LENGTH, pad, 1, text=text)

    def said(before: SFTSource, ours: SFTSource, **config: Any) -> str:
        manifest = {
            "config": {"train": {}, "data": {"heldout_share": 0.05}},
            "identity": {"data": before.fingerprint},
            "samples": 0,
            "data_spans": [{"facts": before.facts}],
        }
        with pytest.raises(ConfigError) as caught:
            check_identity("step_4", manifest, {"data": ours.fingerprint}, ours, {"train": {}, **config})
        found = re.search(r"than this config: (.*); set it back", str(caught.value))
        assert found and not re.search("[0-9a-f]{8}", found[1])
        return found[1]

    total = len(examples(chat))
    assert said(source(total), source(total - 2), data={"heldout_share": 0.1}) == (
        f"data.heldout_share 0.05 -> 0.1; its data differ: dialogues {total} examples -> {total - 2} examples"
    )
    others = SFTSource({"dialogues": Records("dialogues", examples(chat, total + 1)[1:])}, LENGTH, pad, 1)
    assert said(source(total), others, data={"heldout_share": 0.05}) == (
        f"its data differ: dialogues differs in content, with {total} examples as before"
    )
    assert said(source(total), source(total, text), data={"heldout_share": 0.05}, task={"kind": "sort"}) == (
        "section task is new; its data differ: its rows of text (data.text_plan) are new"
    )
    assert source(total, replace(text, weight=0.25)).difference(source(3, text).facts) == (
        f"dialogues 3 examples -> {total} examples; data.text_weight 0.5 -> 0.25"
    )


@pytest.mark.parametrize("weight", [0.1, 0.25, 0.9])
def test_rows_of_text_have_their_share_wherever_the_samples_are_cut(
    chat: ChatFormat, plan: Plan, weight: float
) -> None:
    found = {"dialogues": Records("dialogues", examples(chat))}
    text = TextShare(PretrainingText(plan, "data.text_plan"), weight)
    source = SFTSource(found, LENGTH, chat.ids["<pad>"], 1, text=text)
    assert source.sources == ["dialogues", "text prose", "text code"]
    whole = source.rows(range(400))
    is_text = [row.source > 0 for row in whole]
    for step in range(0, 400, 20):  # evenly spread: every global batch has the share
        assert abs(sum(is_text[step : step + 20]) - 20 * weight) < 1
    for cut in (1, 7, 50):
        parts = [row for first in range(0, 400, cut) for row in source.rows(range(first, min(400, first + cut)))]
        assert all(a.tokens.tolist() == b.tokens.tolist() for a, b in zip(parts, whole, strict=True))
    texts = [row for row in whole if row.source]
    for number, row in enumerate(texts):  # the plan's rows in order, again and again
        expected = plan.row(number % plan.num_samples)
        assert row.tokens.tolist() == expected.tokens.tolist() and row.source == 1 + expected.source
        assert row.loss_mask.tolist() == expected.loss_mask.tolist()
    bare = SFTSource(found, LENGTH, chat.ids["<pad>"], 1)
    dialogues = [row.tokens.tolist() for row in whole if not row.source]
    assert dialogues == [row.tokens.tolist() for row in bare.rows(range(len(dialogues)))]
    other = SFTSource(found, LENGTH, chat.ids["<pad>"], 1, text=TextShare(text.text, weight / 2))
    assert len({bare.fingerprint, source.fingerprint, other.fingerprint}) == 3
    assert "weight" in other.difference(source.facts)
    assert [len(rows) > 0 for rows in source.heldout(3).values()] == [False, True, True]
    assert source.files() and not bare.files()
    for half in ({"text_plan": "plan"}, {"text_weight": 0.1}):
        with pytest.raises(ConfigError, match=r"data\.text_plan = .* and data\.text_weight = .* belong together"):
            validate(FineTuningData, half)


def test_broken_and_long_dialogues_are_set_aside_and_counted(chat: ChatFormat, tmp_path: Path) -> None:
    records = [dialogue(f"question {i}", f"answer {i}") for i in range(60)]
    records += [
        '{"id": "cut off',
        {"id": "x", "messages": [{"role": "assistant", "content": "first"}]},
        {"id": "x"},
        ["not", "an", "object"],
        "[" * 100_000,
        dialogue("nobody answers"),
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]},
        dialogue("why? " * 100, "because"),
    ]
    path = write(tmp_path / "d.jsonl.gz", records)
    found = read_dialogues([path], chat, LENGTH, heldout_share=0.2, max_bad_share=0.2)
    assert dict(found.set_aside.counts) == {
        "bad_json": 2,
        "bad_messages: roles out of turn": 1,
        "bad_messages: no key 'messages'": 1,
        "no_object": 1,
        "no_assistant_turn": 1,
        "no_turn_to_train": 1,
        "too_long": 1,
    }
    assert len(found.train) + len(found.heldout) == 60
    assert ":68, " in found.set_aside.first["too_long"]
    with pytest.raises(ValueError, match=r"8 of 68 dialogues .* 0\.05.*too_long \(first: .*:68, \d+ tokens\)"):
        read_dialogues([path], chat, LENGTH, heldout_share=0.2, max_bad_share=0.05)
    with pytest.raises(ValueError, match=r"absent\.jsonl, which is no file"):
        read_dialogues([str(tmp_path / "absent.jsonl")], chat, LENGTH, 0.1, 0.1)


@pytest.mark.parametrize(
    ("messages", "rule", "what"),
    [
        ("hello", "no list of messages", "'messages' is str, not a list"),
        ({"role": "user"}, "no list of messages", "'messages' is dict, not a list"),
        (None, "no key 'messages'", "its keys are 'id'"),
        ([], "no user message", "at least one user message"),
        ([{"role": "system", "content": "be kind"}], "no user message", "at least one user message"),
        (["hello"], "a message is no object", "message 0 is str"),
        *(
            (
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": wrong}],
                "tool calls that are no list of objects",
                f"message 1 has 'tool_calls' that are no list of objects, but {wrong!r}",
            )
            for wrong in (5, ["f"])
        ),
        ([{"content": "hello"}], "no role", "message 0 has no role; roles are system"),
        ([{"role": ["user"], "content": "hello"}], "no role", "message 0 has ['user'] as its role"),
        ([{"role": "human", "content": "hello"}], "an unknown role", "message 0 has role 'human', which is none of"),
        ([{"role": "developer", "content": "a"}, USER], "a role that the format lacks", "format has system, user"),
        ([USER, ANSWER | {"tool_calls": [{"function": {"name": "add"}}]}], "tools", "message 1 calls tools"),
        ([{"role": "user", "content": "a"}] * 2, "roles out of turn", "message 1 has role 'user' where 'assistant'"),
        ([{"role": "user"}], "no text in content", "message 0 has no text in 'content', which is missing"),
        ([{"role": "user", "content": [{"type": "text"}]}], "no text in content", "'content', which is list"),
        ([{"role": "user", "content": None}], "no text in content", "'content', which is NoneType"),
        ([{"role": "user", "content": "\ud800"}], "text that cannot be encoded", "half a surrogate pair"),
    ],
)
def test_a_broken_dialogue_says_which_rule_it_broke(
    chat: ChatFormat, tmp_path: Path, messages: Any, rule: str, what: str
) -> None:
    good, bad = [dialogue(f"question {i}", f"answer {i}") for i in range(5)], {"id": "x", "messages": messages}
    path = write(tmp_path / "d.jsonl.gz", [*good, bad, bad])
    found = read_dialogues([path], chat, LENGTH, 0.0, 1.0)
    assert dict(found.set_aside.counts) == {f"bad_messages: {rule}": 2}
    assert f"2 bad_messages: {rule} (first: {path}:6, " in str(found) and what in str(found)
    with pytest.raises(ValueError) as raised:
        read_dialogues([path], chat, LENGTH, 0.0, 0.1)
    assert f"2 bad_messages: {rule} (first: {path}:6, " in str(raised.value) and what in str(raised.value)


def test_when_nothing_is_left_the_reason_is_told_and_its_remedy_works(chat: ChatFormat, tmp_path: Path) -> None:
    long = write(tmp_path / "long.gz", [dialogue("why? " * i, "because") for i in range(90, 100)])
    with pytest.raises(ValueError, match=r"all 10 dialogues of .* were set aside: 10 too_long") as raised:
        read_dialogues([long], chat, LENGTH, 0.0, 1.0)
    fitting = int(str(raised.value).partition("set train.seq_length=")[2].partition(",")[0])
    assert len(read_dialogues([long], chat, fitting, 0.0, 0.0).train) == 10
    with pytest.raises(ValueError, match=rf"10 of 10 dialogues were set.* set train\.seq_length={fitting}, which"):
        read_dialogues([long], chat, LENGTH, 0.0, 0.5)
    same = write(tmp_path / "same.gz", [dialogue("question", f"answer {i}") for i in range(5)])
    with pytest.raises(ValueError, match=r"all 5 usable dialogues .* are held out; lower data\.heldout_share = 0\.999"):
        read_dialogues([same], chat, LENGTH, 0.999, 1.0)
    broken = write(tmp_path / "broken.gz", ["{", {"messages": 3}])
    with pytest.raises(ValueError, match=r"all 2 dialogues .* were set aside: 1 bad_json .* 1 bad_messages: no list"):
        read_dialogues([broken], chat, LENGTH, 0.0, 1.0)
    with pytest.raises(ValueError, match="has no dialogue"):
        read_dialogues([write(tmp_path / "empty.gz", [])], chat, LENGTH, 0.0, 1.0)


def test_a_damaged_file_is_named(chat: ChatFormat, tmp_path: Path) -> None:
    path = Path(write(tmp_path / "d.jsonl.gz", [dialogue(f"question {i}", f"answer {i * i}") for i in range(500)]))
    whole = path.read_bytes()
    for content in (whole[:-40], b"no gzip at all", whole[:200] + b"\0" * 40 + whole[240:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"d\.jsonl\.gz in data\.dialogues cannot be read"):
            read_dialogues([str(path)], chat, LENGTH, 0.1, 1.0)


def test_heldout_dialogues_share_no_first_message_with_training(chat: ChatFormat, tmp_path: Path) -> None:
    records = [dialogue(f"question {i % 30}", f"answer {i}") for i in range(120)]
    found = read_dialogues([write(tmp_path / "d.gz", records)], chat, LENGTH, 0.3, 0.0)

    def firsts(split: list[Example]) -> set[str]:
        return {example.id for example in split}  # `dialogue` uses the first message as id

    assert firsts(found.train) and firsts(found.heldout)
    assert not firsts(found.train) & firsts(found.heldout)


def test_an_unsupervised_end_is_refused(chat: ChatFormat) -> None:
    tokens, answer = chat.render(dialogue("hello", "fine", "hello", "name")["messages"])
    check_supervision(tokens, answer, chat)
    (ends,) = np.nonzero((tokens == chat.end_id) & answer)
    assert len(ends) == 2
    for end in ends:
        masked = answer.copy()
        masked[end] = False
        with pytest.raises(ValueError, match=rf"position {end} .* not in the loss mask"):
            check_supervision(tokens, masked, chat)
    with pytest.raises(ValueError, match="all zero"):
        check_supervision(tokens, np.zeros_like(answer), chat)
    with pytest.raises(ValueError, match="not closed"):
        check_supervision(tokens[:-1], answer[:-1], chat)


def test_demonstrations_are_right_and_their_splits_disjoint(chat: ChatFormat) -> None:
    task = SortTask(4)
    splits = {split: demonstrations(task, chat, 5, split, 50, LENGTH) for split in ("train", "heldout")}  # type: ignore[arg-type]
    for found in splits.values():
        for example in found:
            text = chat.decode_answer(example.tokens[example.answer].tolist())
            assert list(text) == sorted(text) and len(text) == 4
    prompts = [{e.tokens[~e.answer].tobytes() for e in found} for found in splits.values()]
    assert not prompts[0] & prompts[1]
    with pytest.raises(ValueError, match=r"train\.seq_length = 8"):
        demonstrations(task, chat, 5, "train", 1, 8)


def test_prompts_and_completions_and_tables_are_the_same_dialogues(chat: ChatFormat, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    said = [("What is it?", "A tree."), ("And that?", "A bird.")]
    records = [{"id": str(i), "prompt": q, "completion": a} for i, (q, a) in enumerate(said)]
    dialogues = [
        {"id": str(i), "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for i, (q, a) in enumerate(said)
    ]
    for name, lines in (("pairs", records), ("dialogues", dialogues)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / f"{name}.parquet")
    found = [
        read_dialogues([str(file)], chat, 64, heldout_share=0.0, max_bad_share=0.0).train
        for file in sorted(tmp_path.iterdir())
    ]
    assert len(found) == 4 and all(len(examples) == 2 for examples in found)
    for one, *others in zip(*found, strict=True):
        for other in others:
            assert one.id == other.id
            assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.answer, other.answer)


def test_answers_in_a_prompt_are_not_learnt(chat: ChatFormat, tmp_path: Path) -> None:
    turns = [("user", "One?"), ("assistant", "Yes."), ("user", "Two?")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": prompt, "completion": "No."}))
    (example,) = read_dialogues([str(tmp_path / "a.jsonl")], chat, 64, heldout_share=0.0, max_bad_share=0.0).train
    assert example.tokens[example.answer].tolist() == [*chat.encode_text("No."), chat.end_id]


def test_tools_that_are_no_list_set_a_dialogue_aside(chat: ChatFormat, tmp_path: Path) -> None:
    good = [dialogue(f"question {i}", f"answer {i}") for i in range(5)]
    path = write(tmp_path / "d.jsonl.gz", [*good, *({**dialogue("q", "a"), "tools": wrong} for wrong in (5, [5]))])
    found = read_dialogues([path], chat, LENGTH, 0.0, 1.0).set_aside
    assert dict(found.counts) == {"bad_tools": 2} and "'tools' is no list of objects, but 5" in found.first["bad_tools"]
