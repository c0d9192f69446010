"""Reward models: examples as rows, what is set aside, losses of pairs and classes, and calibration."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from configs.loader import ConfigError, validate
from configs.reward_model import ExamplesConfig, RewardModelConfig, RewardSection
from data_pipeline.mixture.rows import Row
from posttrain.chat.chat_format import ChatFormat
from posttrain.preference.group_packing import Segment, pack
from posttrain.preference.preference_pairs import read_pairs
from posttrain.reward_model.calibration import BINS, BinnedLoss
from posttrain.reward_model.judged_examples import read_examples
from posttrain.reward_model.reward_losses import MARGIN, ClassLoss, PreferenceLoss, bradley_terry
from pretrain.data.batch_source import collate

USER = {"role": "user", "content": "how are you?"}


def said(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


def write(path: Path, records: Sequence[Any]) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_bytes(gzip.compress("\n".join(lines).encode()) if path.suffix == ".gz" else "\n".join(lines).encode())
    return str(path)


def test_all_spellings_of_a_pair_give_the_same_tokens(chat: ChatFormat, tmp_path: Path) -> None:
    spellings: list[dict[str, Any]] = [
        {"prompt": "how are you?", "chosen": "fine", "rejected": "who?"},
        {"prompt": [USER], "chosen": [said("fine")], "rejected": [said("who?")]},
        {"prompt": "how are you?", "chosen": [USER, said("fine")], "rejected": [USER, said("who?")]},
        {"chosen": [USER, said("fine")], "rejected": [USER, said("who?")], "margin": 2},
    ]
    found = read_pairs([write(tmp_path / "pairs.jsonl.gz", spellings)], chat, 64, 0.0, 0.0).train
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(spellings[:1]), tmp_path / "pairs.parquet")
    found += read_pairs([str(tmp_path / "pairs.parquet")], chat, 64, 0.0, 0.0).train
    assert [pair.margin for pair in found] == [None, None, None, 2.0, None]
    tokens, answer = chat.render([USER, said("fine")])  # type: ignore[list-item]
    for pair in found:
        assert np.array_equal(pair.chosen.tokens, tokens) and np.array_equal(pair.chosen.answer, answer)


def test_only_the_last_answer_of_a_longer_dialogue_is_what_the_pair_is_about(chat: ChatFormat, tmp_path: Path) -> None:
    before = [USER, said("fine"), said("and now?", "user")]
    record = {"chosen": [*before, said("fine")], "rejected": [*before, said("fine"), USER, said("who?")]}
    (pair,) = read_pairs([write(tmp_path / "pairs.jsonl", [record])], chat, 128, 0.0, 0.0).train
    assert pair.chosen.answer.sum() == len(chat.encode_text("fine")) + 1
    assert pair.rejected.answer.sum() == len(chat.encode_text("fine")) + len(chat.encode_text("who?")) + 2


BROKEN: dict[str, Any] = {
    "equal_sides": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "too_long": {"prompt": "a", "chosen": "b" * 99, "rejected": "c"},
    "no_chosen": {"prompt": "a", "rejected": "c"},
    "no_prompt": {"chosen": "b", "rejected": "c"},
    "bad_margin": {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"},
    "different_prompts": {"chosen": [said("x", "user"), said("b")], "rejected": [USER, said("b")]},
    "bad_messages: roles out of turn": {"prompt": [USER, USER], "chosen": "b", "rejected": "c"},
    "bad_rejected": {"prompt": "a", "chosen": "b", "rejected": 3},
    "bad_json": "{",
    "no_object": "[]",
}


def test_pairs_that_cannot_be_used_are_counted_by_reason_with_the_first_of_each(
    chat: ChatFormat, tmp_path: Path
) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "pairs.jsonl", [good, *BROKEN.values(), BROKEN["equal_sides"]])
    found = read_pairs([path], chat, 64, 0.0, 1.0)
    assert len(found.train) == 1
    assert found.set_aside.counts == {**dict.fromkeys(BROKEN, 1), "equal_sides": 2}
    assert found.set_aside.first["equal_sides"] == f"{path}:2" and "how many" not in str(found.set_aside)
    with pytest.raises(
        ValueError, match=r"11 of 12 pairs were set aside, more than data.max_bad_share = 0.5: .*correct"
    ):
        read_pairs([path], chat, 64, 0.0, 0.5)
    only = write(tmp_path / "long.jsonl", [BROKEN["too_long"]])
    with pytest.raises(ValueError, match=r"all 1 pairs .* were set aside: 1 too_long .*set train.seq_length=") as error:
        read_pairs([only], chat, 64, 0.0, 1.0)
    enough = int(str(error.value).partition("train.seq_length=")[2].partition(",")[0])
    assert len(read_pairs([only], chat, enough, 0.0, 1.0).train) == 1


def examples(kind: str, chat: ChatFormat, path: str, **section: Any) -> Any:
    settings = validate(RewardSection, {"kind": kind, **section})
    return read_examples(validate(ExamplesConfig, {"files": [path], "max_bad_share": 1.0}), settings, chat, 64)


def test_a_pair_is_judged_on_the_last_token_of_both_sides(chat: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"prompt": f"a{i}", "chosen": "b", "rejected": "cc"} for i in range(40)])
    found = examples("preference", chat, path, margin=0.5)
    (row, *_) = pack(found.train, 64, chat.tokenizer.pad_id)
    ends = np.flatnonzero(row.loss_mask)
    assert (row.tokens[ends] == chat.end_id).all() and len(ends) == len(set(row.segments[ends])) >= 2
    assert (row.extra[MARGIN][ends] == 0.5).all()
    following = np.append(row.segments[1:], -1)[ends]
    assert (following != row.segments[ends]).all()


def test_each_step_is_judged_where_its_separator_ends(chat: ChatFormat, tmp_path: Path) -> None:
    record = {"prompt": "Sort 21", "steps": ["first 1", "then 2"], "labels": [True, "wrong"]}
    unlabelled = {"prompt": "Sort 21", "steps": ["first 1", "then 2"], "labels": [True]}
    outside = {"prompt": "Sort 21", "steps": ["first 1"], "labels": [7]}
    found = examples("process", chat, write(tmp_path / "steps.jsonl", [record, unlabelled, outside]))
    ((segment,),) = found.train + found.heldout
    first, second = np.flatnonzero(segment.loss_mask)
    prompt = chat.render_prompt([{"role": "user", "content": "Sort 21"}])
    assert segment.tokens[: first + 1].tolist() == prompt + chat.encode_text("first 1\n")
    assert second == len(segment.tokens) - 1
    assert segment.labels[[first, second]].tolist() == [1, 0]
    assert found.set_aside.counts == {"a_step_without_label": 1, "unknown_label": 1}


def test_texts_and_dialogues_have_a_class_on_their_last_token(chat: ChatFormat, tmp_path: Path) -> None:
    records: list[Any] = [
        {"text": "hello", "label": "good"},
        {"messages": [USER, said("fine")], "label": 0},
        {"text": "hello", "label": "odd"},
        {"text": "hello"},
        {"text": "", "label": 1},
    ]
    found = examples("classification", chat, write(tmp_path / "texts.jsonl", records), labels=["bad", "good"])
    units = found.train + found.heldout
    assert sorted(int(unit[0].labels[-1]) for unit in units) == [0, 1]
    assert all(unit[0].loss_mask.sum() == 1 and unit[0].loss_mask[-1] for unit in units)
    assert found.set_aside.counts == {"unknown_label": 1, "no_label": 1, "bad_text": 1}


def rows(values: Sequence[float], seq_length: int) -> list[Row]:
    """Packs pairs of two-token sides; the second token of side i is i."""
    units = []
    for i in range(0, len(values), 2):
        mask = np.array([False, True])
        sides = [Segment(np.array([0, side]), np.zeros(2, int), mask, {MARGIN: np.full(2, 0.3)}) for side in (i, i + 1)]
        units.append(sides)
    return list(pack(units, seq_length, 0))


@pytest.mark.parametrize("seq_length", [4, 9, 40])
def test_each_pair_counts_once_however_rows_are_packed(seq_length: int) -> None:
    given = torch.tensor([1.0, -0.5, 0.2, 0.9, -1.0, 3.0, 0.1, 0.1], requires_grad=True)
    expected = bradley_terry(given[0::2], given[1::2], 0.3, 0.01).mean()
    total = weight = torch.zeros(())
    for row in rows(given.tolist(), seq_length):
        batch = collate([row])
        loss_BS, metrics = PreferenceLoss(0.01)(given[batch.tokens.clamp(0, 7)], batch)
        total, weight = total + (loss_BS * batch.loss_mask).sum(), weight + batch.loss_mask.sum()
        assert ((loss_BS != 0) <= (batch.loss_mask > 0)).all() and metrics.keys() == set(PreferenceLoss.metrics)
    torch.testing.assert_close(total / weight, expected)
    ours, right = torch.autograd.grad(total / weight, given)[0], torch.autograd.grad(expected, given)[0]
    torch.testing.assert_close(ours, right)


def test_decisions_are_sorted_into_bins_by_confidence() -> None:
    batch = collate(rows([2.0, -1.0, 0.0, 0.1, 0.0, 4.0], 40))
    values = torch.tensor([2.0, -1.0, 0.0, 0.1, 0.0, 4.0])[batch.tokens.clamp(0, 5)]
    _, metrics = BinnedLoss(PreferenceLoss())(values, batch)
    shares = [float((metrics[f"share_{i}"] * batch.loss_mask).sum() / batch.loss_mask.sum()) for i in range(BINS)]
    right = [float((metrics[f"accuracy_{i}"] * batch.loss_mask).sum() / batch.loss_mask.sum()) for i in range(BINS)]
    assert shares == pytest.approx([1 / 3, 0, 0, 0, 2 / 3]) and right == pytest.approx([0, 0, 0, 0, 1 / 3])


def test_classes_have_the_cross_entropy_of_their_logits() -> None:
    segment = Segment(np.arange(3), np.array([0, 2, 1]), np.array([False, True, True]))
    batch = collate(pack([[segment]], 5, 0))
    values = torch.randn(1, 5, 3)
    loss_BS, _ = ClassLoss(3)(values, batch)
    right = torch.nn.functional.cross_entropy(values[0, 1:3], torch.tensor([2, 1]), reduction="sum")
    torch.testing.assert_close(loss_BS.sum(), right)
    confidence, is_right = ClassLoss(3).decisions(values, batch)
    assert confidence.tolist() == pytest.approx(values.softmax(-1).amax(-1)[0, 1:3].tolist())
    assert is_right.tolist() == (values[0, 1:3].argmax(-1) == torch.tensor([2, 1])).tolist()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward_model": {"kind": "classification"}}, "needs reward_model.labels"),
        ({"reward_model": {"labels": ["a", "b"]}}, "labels names classes, and pairs have none"),
        ({"reward_model": {"kind": "process", "centring": 0.1}}, "margin and centring are for pairs"),
        ({"reward_model": {"kind": "process", "labels": ["a", "a"]}}, "not two or more different names"),
        ({"parallel": {"cp": 2}}, "both sides of a pair must be on one rank; set parallel.cp=1"),
    ],
)
def test_configs_that_contradict_themselves_are_refused(changes: dict[str, Any], said: str) -> None:
    config: dict[str, Any] = {
        "run": {"dir": "x"},
        "init": {"run": "y"},
        "data": {"files": ["z"]},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "seq_length": 8},
        "optimizer": {"lr": 0.1},
    }
    with pytest.raises(ConfigError, match=said):
        validate(RewardModelConfig, config | changes)
