"""Rows of a preference run: pairs of answers, or for KTO single ones, as segments with a weight for each token.

A pair's two dialogues follow one another in the same row, the chosen one first, so that a loss of pairs is a function
of one row. Each of a pair's (or answer's) trained tokens has the weight 1 / their number: so every pair counts once in
the mean over the global batch, however the step is cut into micro-batches and ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from configs.preference import PreferenceConfig
from data_pipeline.mixture.packing import best_fit
from posttrain.chat.dialogues import as_messages, tools_of
from posttrain.chat.format_interface import Chat
from posttrain.preference.group_packing import PackedRow, Segment, pack
from posttrain.preference.preference_pairs import Pair, first_question, read_pairs, rendered_answer
from posttrain.records import TOO_LONG, Records, Unusable, needed, read_split

WEIGHT, DESIRABLE = "weight", "desirable"  # names in `PackedRow.extra`


@dataclass(frozen=True)
class Answer:
    """A dialogue whose last answer was judged; `answer` bool [T] marks it, and `prompt` tokens precede it."""

    id: str
    tokens: np.ndarray
    answer: np.ndarray
    prompt: int
    desirable: bool


@dataclass(frozen=True)
class PreferenceRows:
    """Rows to train on and held-out ones. For KTO `mismatched` has a row for each to train on, else it is empty.

    A mismatched row has the prompts of its row, each with the answer to another one.
    """

    train: list[PackedRow]
    heldout: list[PackedRow]
    mismatched: list[PackedRow]
    said: str  # what was read and set aside, for the user


def read_rows(config: PreferenceConfig, chat: Chat, parts: int) -> PreferenceRows:
    """Reads and packs the data of a config. Raises ValueError, with a remedy, as `read_split` does."""
    data, length, pad = config.data, config.train.seq_length, chat.tokenizer.pad_id
    assert data is not None, "online pairs are sampled, not read"
    shares = data.heldout_share, data.max_bad_share
    if config.preference.loss == "kto":
        answers = read_answers(data.pairs, chat, length, *shares, parts)
        if len({answer.desirable for answer in answers.train}) < 2:
            raise ValueError(
                f"data.pairs: all {len(answers.train)} completions to train on have the same label, so nothing is to "
                "be preferred; add records of the other label"
            )
        train, mismatched = rows_of_answers(answers.train, length, pad)
        return PreferenceRows(train, rows_of_answers(answers.heldout, length, pad)[0], mismatched, str(answers))
    pairs = read_pairs(data.pairs, chat, length, *shares, parts)
    return PreferenceRows(
        rows_of_pairs(pairs.train, length, pad), rows_of_pairs(pairs.heldout, length, pad), [], str(pairs)
    )


def rows_of_pairs(pairs: Sequence[Pair], seq_length: int, pad_id: int) -> list[PackedRow]:
    """Packs whole pairs into rows; segments 2k and 2k + 1 are the chosen and the rejected side of its pair k."""
    units = []
    for pair in pairs:
        sides = pair.chosen, pair.rejected
        weight = 1 / sum(int(side.answer[1:].sum()) for side in sides)
        units.append([_segment(side.tokens, side.answer, weight) for side in sides])
    return [_weighted(row) for row in pack(units, seq_length, pad_id)]


def rows_of_answers(answers: Sequence[Answer], seq_length: int, pad_id: int) -> tuple[list[PackedRow], list[PackedRow]]:
    """Packs answers into rows, one segment each, and returns these and a mismatched row for each."""
    rows, mismatched = [], []
    for members in best_fit([len(answer.tokens) for answer in answers], seq_length):
        own = [answers[i] for i in members]
        if len(own) > 1:
            others: list[Answer | None] = [*own[1:], own[0]]
        else:
            others = [_that_fits(answers, members[0], seq_length)]
        rows += pack([[_answer_segment(answer) for answer in own]], seq_length, pad_id)
        mixed = [_mismatched(answer, other) for answer, other in zip(own, others, strict=True)]
        mismatched += pack([mixed], seq_length, pad_id)
    return [_weighted(row) for row in rows], [_weighted(row) for row in mismatched]


def read_answers(
    paths: Sequence[str], chat: Chat, seq_length: int, heldout_share: float, max_bad_share: float, parts: int = 1
) -> Records[Answer]:
    """Reads records with `prompt`, `completion` and `label`; see `read_split` for the rest and the errors."""

    def parse(location: str, record: dict[str, Any]) -> tuple[list[Answer], str]:
        prompt = as_messages(needed(record, "prompt"), "user", "prompt")
        completion = as_messages(needed(record, "completion"), "assistant", "completion")
        label = needed(record, "label")
        if not isinstance(label, bool):
            raise Unusable("bad_label", f"'label' is {label!r}, not true or false")
        dialogue = rendered_answer(chat, prompt, completion, tools_of(record))
        tokens, answer = dialogue.tokens, dialogue.answer
        if len(tokens) > seq_length:
            raise Unusable(TOO_LONG, f"{len(tokens)} tokens", len(tokens))
        first = int(answer.argmax())
        return [Answer(str(record.get("id", location)), tokens, answer, first, label)], first_question(prompt)

    return read_split(paths, "data.pairs", "completions", parse, heldout_share, max_bad_share, parts)


def _that_fits(answers: Sequence[Answer], i: int, seq_length: int) -> Answer | None:
    """Returns the next answer to another prompt that fits after the prompt of answer `i`, None if there is none."""
    own = answers[i]
    for other in [*answers[i + 1 :], *answers[:i]]:
        if own.prompt + len(other.tokens) - other.prompt <= seq_length:
            return other
    return None


def _mismatched(answer: Answer, other: Answer | None) -> Segment:
    """Returns the prompt of one answer with the text of another; without another, all weights are 0."""
    if other is None or other is answer:
        return _segment(answer.tokens, answer.answer, 0.0)
    tokens = np.concatenate((answer.tokens[: answer.prompt], other.tokens[other.prompt :]))
    mask = np.concatenate((np.zeros(answer.prompt, dtype=bool), other.answer[other.prompt :]))
    return _segment(tokens, mask, 1 / int(mask[1:].sum()))


def _answer_segment(answer: Answer) -> Segment:
    segment = _segment(answer.tokens, answer.answer, 1 / int(answer.answer[1:].sum()))
    label = np.full(len(answer.tokens), answer.desirable, dtype=np.float32)
    return replace(segment, extra={**segment.extra, DESIRABLE: label})


def _segment(tokens: np.ndarray, answer: np.ndarray, weight: float) -> Segment:
    mask = np.append(answer[1:], False)  # position t predicts token t + 1
    labels = np.where(mask, np.append(tokens[1:], 0), 0)
    return Segment(tokens, labels, mask, {WEIGHT: np.where(mask, weight, 0.0).astype(np.float32)})


def _weighted(row: PackedRow) -> PackedRow:
    """Returns a row whose loss mask is the weights of its tokens."""
    extra = {name: values for name, values in row.extra.items() if name != WEIGHT}
    return replace(row, loss_mask=row.extra[WEIGHT], extra=extra)
