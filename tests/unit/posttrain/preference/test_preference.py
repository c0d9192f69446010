"""Preferences: what is read and set aside, rows in which each pair counts once, and the losses on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from configs.loader import ConfigError, validate
from configs.preference import PreferenceConfig, PreferenceSection
from posttrain.chat.chat_format import ChatFormat
from posttrain.preference import reference_logprobs
from posttrain.preference.preference_examples import Answer, read_answers, read_rows, rows_of_answers, rows_of_pairs
from posttrain.preference.preference_losses import LOSSES
from posttrain.preference.preference_pairs import Pair, read_pairs
from posttrain.preference.reference_logprobs import file_of, with_reference
from posttrain.preference.trained_loss import REFERENCE, AnswerPreference, PairPreference
from posttrain.records import Records
from pretrain.data.batch_source import collate
from pretrain.model.batch import Batch

USER, BOTH = {"role": "user", "content": "sort 312"}, ("123", "321")


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(folder: Path, records: list[Any]) -> list[str]:
    path = folder / "records.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return [str(path)]


def pairs_of(folder: Path, chat: ChatFormat, records: list[Any], length: int = 64) -> Records[Pair]:
    return read_pairs(write(folder, records), chat, length, heldout_share=0.0, max_bad_share=1.0)


def test_every_form_of_a_pair_is_the_same_pair(tmp_path: Path, chat: ChatFormat) -> None:
    chosen, rejected = map(said, BOTH)
    forms = [
        {"prompt": "sort 312", "chosen": "123", "rejected": "321"},
        {"prompt": [USER], "chosen": [chosen], "rejected": [rejected]},
        {"chosen": [USER, chosen], "rejected": [USER, rejected]},
        {"prompt": "sort 312", "chosen": [USER, chosen], "rejected": [USER, rejected]},
    ]
    found = pairs_of(tmp_path, chat, forms)
    assert len(found.train) == 4, str(found)
    for pair in found.train:
        for side, text in ((pair.chosen, "123"), (pair.rejected, "321")):
            assert side.tokens.tolist() == chat.render([USER, said(text)])[0].tolist()  # type: ignore[list-item]
            assert chat.decode_answer(side.tokens[side.answer]) == text


def test_bad_pairs_are_set_aside_by_reason(tmp_path: Path, chat: ChatFormat) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    bad = {
        "equal_sides": {"prompt": "a", "chosen": "b", "rejected": "b"},
        "no_rejected": {"prompt": "a", "chosen": "b"},
        "no_prompt": {"chosen": "b", "rejected": "c"},
        "bad_chosen": {"prompt": "a", "chosen": 5, "rejected": "c"},
        "bad_json": "{",
        "too_long": {"prompt": "a", "chosen": "b" * 60, "rejected": "c"},
        "different_prompts": {"chosen": [USER, said("1")], "rejected": [{**USER, "content": "x"}, said("2")]},
    }
    found = pairs_of(tmp_path, chat, [good, *bad.values()], length=40)
    assert set(found.set_aside.counts) == bad.keys() and len(found.train) == 1, str(found)
    with pytest.raises(ValueError, match=r"7 of 8 pairs were set aside, more than data.max_bad_share = 0.5"):
        read_pairs(write(tmp_path, [good, *bad.values()]), chat, 40, heldout_share=0.0, max_bad_share=0.5)


def test_bad_completions_are_set_aside_and_one_label_alone_is_refused(tmp_path: Path, chat: ChatFormat) -> None:
    records = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": [USER], "completion": [said("123")], "label": False},
        {"prompt": "a", "completion": "b", "label": 1},
        {"prompt": "a", "label": True},
        {"prompt": "a", "completion": "b" * 60, "label": True},
    ]
    found = read_answers(write(tmp_path, records), chat, 40, heldout_share=0.0, max_bad_share=1.0)
    assert set(found.set_aside.counts) == {"bad_label", "no_completion", "too_long"}
    first, second = found.train
    assert chat.decode_answer(second.tokens[second.answer]) == "123" and (first.desirable, second.desirable) == (1, 0)
    config = make_config(tmp_path, records[:1], loss="kto")
    with pytest.raises(ValueError, match=r"all 1 completions to train on have the same label"):
        read_rows(config, chat, 1)


def make_config(folder: Path, records: list[Any], **section: Any) -> PreferenceConfig:
    tree = {
        "run": {"dir": str(folder / "run")},
        "init": {"run": "x"},
        "data": {"pairs": write(folder, records), "heldout_share": 0.0},
        "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 1, "seq_length": 40},
        "optimizer": {"lr": 1e-3},
        "preference": section,
    }
    return validate(PreferenceConfig, tree)


def test_keys_of_other_losses_are_refused(tmp_path: Path) -> None:
    for section, message in (
        ({"smoothing": 0.2}, r"preference.smoothing is a number of conservative and robust, and .* 'dpo'"),
        ({"loss": "kto", "sft_weight": 1.0}, r"preference.sft_weight needs a chosen answer"),
        ({"loss": "ipo", "undesirable_weight": 2.0}, r"undesirable_weight is a number of kto"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_config(tmp_path, [], **section)


def some_pairs(count: int, seed: int = 0) -> list[Pair]:
    """Returns pairs of random tokens, whose answers begin at token 3."""
    from posttrain.preference.preference_pairs import Dialogue

    random = np.random.default_rng(seed)

    def dialogue() -> Dialogue:
        length = int(random.integers(5, 12))
        return Dialogue(random.integers(3, 50, length), np.arange(length) >= 3)

    return [Pair(str(i), dialogue(), dialogue()) for i in range(count)]


def logprobs_of(batch: Batch, salt: float) -> torch.Tensor:
    """Returns log-probabilities that depend on token, label and position alone, 0 where nothing is trained."""
    value = torch.sin(batch.tokens * 1.7 + batch.labels * 0.9 + batch.positions * 2.3 + salt) - 1.5
    return torch.where(batch.loss_mask > 0, value, 0.0)


def by_hand(pair: Pair, loss: str, beta: float) -> float:
    """Computes the formulas as in TRL's DPO trainer, from the pair's own tokens."""
    found = []
    for side in (pair.chosen, pair.rejected):
        for salt in (0.0, 0.5):
            total = 0.0
            for t in range(len(side.tokens) - 1):
                if side.answer[t + 1]:
                    total += float(np.sin(side.tokens[t] * 1.7 + side.tokens[t + 1] * 0.9 + t * 2.3 + salt) - 1.5)
            found.append(total)
    chosen, ref_chosen, rejected, ref_rejected = found
    long, short = int(pair.chosen.answer.sum()), int(pair.rejected.answer.sum())
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    means = (chosen - ref_chosen) / long - (rejected - ref_rejected) / short

    def log_sigmoid(x: float) -> float:
        return float(logsigmoid(torch.tensor(x, dtype=torch.float64)))

    odds = (chosen / long - rejected / short) - (np.log1p(-np.exp(chosen / long)) - np.log1p(-np.exp(rejected / short)))
    return {
        "dpo": -log_sigmoid(beta * logits),
        "conservative": -log_sigmoid(beta * logits) * 0.9 - log_sigmoid(-beta * logits) * 0.1,
        "robust": (-log_sigmoid(beta * logits) * 0.9 + log_sigmoid(-beta * logits) * 0.1) / 0.8,
        "ipo": (logits - 1 / (2 * beta)) ** 2,
        "ipo_mean": (means - 1 / (2 * beta)) ** 2,
        "hinge": max(0.0, 1 - beta * logits),
        "orpo": -chosen / long - beta * log_sigmoid(odds),
        "simpo": -log_sigmoid(beta * (chosen / long - rejected / short) - 1.0),
    }[loss]


def step(pairs: list[Pair], loss: str, seq_length: int, micro_batch: int) -> tuple[float, float, dict[str, float]]:
    """Returns the loss of a global batch as the trainer computes it, its gradient's norm, and the mean metrics."""
    rows = rows_of_pairs(pairs, seq_length, pad_id=0)
    function = PairPreference(PreferenceSection(loss=loss, beta=0.3))  # type: ignore[arg-type]
    total, weight, squares, sums = 0.0, 0.0, 0.0, dict.fromkeys(function.metrics, 0.0)
    for i in range(0, len(rows), micro_batch):
        batch = collate(rows[i : i + micro_batch])
        known = with_reference(rows[i : i + micro_batch], logprobs_of(batch, 0.5).numpy())
        batch = collate(known)
        lp = logprobs_of(batch, 0.0).requires_grad_()
        loss_BS, metrics = function(lp, batch)
        scaled = (loss_BS * batch.loss_mask).sum()
        (grad,) = torch.autograd.grad(scaled, lp)
        total, weight = total + float(scaled.detach()), weight + float(batch.loss_mask.sum())
        squares += float(grad.square().sum())
        for name, value in metrics.items():
            sums[name] += float((value * batch.loss_mask).sum())
    return total / weight, squares**0.5 / weight, {name: value / weight for name, value in sums.items()}


@pytest.mark.parametrize("loss", LOSSES)
def test_each_pair_counts_once_however_rows_are_packed(loss: str) -> None:
    """Compares the trainer's loss with the mean over pairs of the formula, worked out by hand for each pair."""
    pairs = some_pairs(7)
    expected = sum(by_hand(pair, loss, 0.3) for pair in pairs) / len(pairs)
    results = [step(pairs, loss, seq_length, micro) for seq_length, micro in ((24, 1), (24, 3), (70, 1), (200, 2))]
    for value, norm, metrics in results:
        assert value == pytest.approx(expected, rel=1e-5)
        assert norm == pytest.approx(results[0][1], rel=1e-5) and norm > 0
        assert metrics == pytest.approx(results[0][2], rel=1e-4)
        assert metrics["rewards/margin"] == pytest.approx(
            metrics["rewards/chosen"] - metrics["rewards/rejected"], abs=1e-5
        )


def test_at_the_reference_dpo_is_log_two_exactly() -> None:
    rows = rows_of_pairs(some_pairs(4), 64, pad_id=0)
    batch = collate(with_reference(rows, logprobs_of(collate(rows), 0.0).numpy()))
    loss, metrics = PairPreference(PreferenceSection())(logprobs_of(batch, 0.0), batch)
    mask = batch.loss_mask > 0
    assert torch.equal(loss[mask], torch.full_like(loss[mask], float(np.log(2))))
    assert not metrics["rewards/margin"].any()


def test_kto_of_packed_answers_and_their_mismatched_rows() -> None:
    pairs = some_pairs(5)
    answers = [
        Answer(pair.id, pair.chosen.tokens, pair.chosen.answer, prompt=3, desirable=i % 2 == 0)
        for i, pair in enumerate(pairs)
    ]
    for seq_length in (14, 100):
        rows, mismatched = rows_of_answers(answers, seq_length, pad_id=0)
        assert len(rows) == len(mismatched)
        assert sum(row.loss_mask.sum() for row in rows) == pytest.approx(5)
        assert sum(row.loss_mask.sum() for row in mismatched) == pytest.approx(5)
        texts = {tuple(a.tokens[:3]): tuple(a.tokens[3:]) for a in answers}
        for row in mismatched:
            for segment in range(int(row.segments.max()) + 1):
                whole = row.tokens[row.segments == segment]
                assert texts[tuple(whole[:3])] != tuple(whole[3:]) and tuple(whole[3:]) in texts.values()
        total, weight = 0.0, 0.0
        function = AnswerPreference(PreferenceSection(loss="kto", beta=0.3, undesirable_weight=1.5))
        function.reference_point = 0.2
        for row in rows:
            batch = collate(with_reference([row], logprobs_of(collate([row]), 0.5).numpy()))
            loss, metrics = function(logprobs_of(batch, 0.0), batch)
            total, weight = total + float((loss * batch.loss_mask).sum()), weight + float(batch.loss_mask.sum())
            assert metrics["kl"][batch.loss_mask > 0] == pytest.approx(0.2)
        expected = 0.0
        for answer in answers:
            t = np.arange(2, len(answer.tokens) - 1)
            x = answer.tokens[t] * 1.7 + answer.tokens[t + 1] * 0.9 + t * 2.3
            ratio = float((np.sin(x) - np.sin(x + 0.5)).sum())
            value = ratio - 0.2 if answer.desirable else 0.2 - ratio
            expected += (1.0 if answer.desirable else 1.5) * (1 - 1 / (1 + np.exp(-0.3 * value)))
        assert total / weight == pytest.approx(expected / 5, rel=1e-5)


def test_reference_logprobs_are_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    path = file_of(str(tmp_path), "model", "data")
    assert path != file_of(str(tmp_path), "model", "other") != file_of(str(tmp_path), "x", "data")
    assert reference_logprobs.load(path, (2, 3)) is None
    values = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    reference_logprobs.save(path, values)
    found = reference_logprobs.load(path, (2, 3))
    assert found is not None and np.array_equal(found, values)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert reference_logprobs.load(path, (3, 3)) is None
    whole = path.read_bytes()
    for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"sha256", b"sha255")):
        path.write_bytes(damaged)  # the second is a safetensors file without fault, but for a bit of a number
        assert reference_logprobs.load(path, (2, 3)) is None
    assert REFERENCE in with_reference(rows_of_pairs(some_pairs(1), 24, 0), np.zeros((1, 24)))[0].extra
