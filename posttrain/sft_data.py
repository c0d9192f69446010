"""SFT data: dialogues and task demonstrations, rendered, checked, packed into rows with document masks.

Everything fits in memory. Each source is packed into rows of its own by best fit; rows of all sources are
visited in an order drawn anew each epoch, so sample i is a pure function of (data, seed, i). Loss falls on
assistant turns alone. Leaves out streaming, sampling weights (give a source more examples instead) and
preference pairs.
"""

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configs.posttrain import DemonstrationConfig, DialogueConfig
from data_pipeline.mixture.packing import best_fit
from data_pipeline.mixture.rows import Row
from posttrain.chat import ChatFormat, Message
from posttrain.tasks import Split, Task, make_task
from pretrain.data import BatchSource


@dataclass(frozen=True)
class Example:
    """One rendered dialogue; `answer` is True on the tokens to be learnt, see `ChatFormat.render`."""

    id: str
    tokens: np.ndarray
    answer: np.ndarray


@dataclass
class Examples:
    """One source's examples by split, and counts of what was set aside by reason, with the first of each."""

    train: list[Example] = field(default_factory=list)
    heldout: list[Example] = field(default_factory=list)
    set_aside: Counter[str] = field(default_factory=Counter)
    first_of_reason: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.set_aside.items()))
        return f"{len(self.train)} to train on, {len(self.heldout)} held out, set aside: {reasons or 'none'}"


def read_examples(
    data: DialogueConfig, settings: DemonstrationConfig | None, chat: ChatFormat, seed: int, seq_length: int
) -> dict[str, Examples]:
    """All sources of an SFT run by name. Errors: ValueError as `read_dialogues` and `demonstrations`."""
    examples = {}
    if data.dialogues:
        shares = data.heldout_share, data.max_bad_share
        examples["dialogues"] = read_dialogues(data.dialogues, chat, seq_length, *shares)
    if settings and settings.demonstrations:
        task = make_task(settings)
        examples[task.name] = Examples(
            demonstrations(task, chat, seed, "train", settings.demonstrations, seq_length),
            demonstrations(task, chat, seed, "heldout", settings.eval_prompts, seq_length),
        )
    return examples


def read_dialogues(
    paths: Sequence[str], chat: ChatFormat, seq_length: int, heldout_share: float, max_bad_share: float
) -> Examples:
    """Reads, renders and splits. Dialogues with the same first message fall into the same split.

    Errors: ValueError if a file is missing, nothing is left, or more than `max_bad_share` was set aside.
    """
    found = Examples()
    for name, line in _lines(paths):
        try:
            example, key = _example(name, line, chat, seq_length)
        except _SetAside as reason:
            found.set_aside[str(reason)] += 1
            found.first_of_reason.setdefault(str(reason), name)
            continue
        (found.heldout if _fraction(key) < heldout_share else found.train).append(example)
    bad, total = found.set_aside.total(), len(found.train) + len(found.heldout) + found.set_aside.total()
    if bad > max_bad_share * total:
        examples = ", ".join(f"{reason} (first: {name})" for reason, name in found.first_of_reason.items())
        raise ValueError(
            f"{bad} of {total} dialogues were set aside, more than data.max_bad_share = {max_bad_share}: {examples}; "
            "mend them, raise train.seq_length if they are too long, or raise the share"
        )
    if not found.train:
        raise ValueError(f"no dialogue to train on in {', '.join(paths)}; check the files and data.heldout_share")
    return found


def demonstrations(task: Task, chat: ChatFormat, seed: int, split: Split, count: int, seq_length: int) -> list[Example]:
    """The first `count` prompts of a split with their right answers."""
    examples = []
    for index in range(count):
        prompt = task.prompt(seed, split, index)
        messages: list[Message] = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": task.answer(prompt)},
        ]
        tokens, answer = chat.render(messages)
        if len(tokens) > seq_length:
            raise ValueError(
                f"{prompt!r} with its answer has {len(tokens)} tokens, more than "
                f"train.seq_length = {seq_length}; raise it"
            )
        check_supervision(tokens, answer, chat)
        examples.append(Example(f"{task.name}/{split}/{index}", tokens, answer))
    return examples


def check_supervision(tokens: np.ndarray, answer: np.ndarray, chat: ChatFormat) -> None:
    """Refuses an answer whose closing <|end|> is not learnt, and nothing to learn at all.

    Errors: ValueError naming the position.
    """
    if not answer.any():
        raise ValueError("the loss mask is all zero: no assistant token would be learnt")
    opened = False
    for position, token in enumerate(tokens.tolist()):
        if token == chat.end_id and opened and not answer[position]:
            raise ValueError(
                f"the <|end|> at position {position} that closes an assistant turn is not in the loss mask; "
                "the model would never learn to stop"
            )
        if token in (chat.assistant_id, chat.end_id):
            opened = token == chat.assistant_id
    if opened:
        raise ValueError("the last assistant turn is not closed by <|end|>; the model would never learn to stop")


def pack(examples: Sequence[Example], seq_length: int, pad_id: int, source: int) -> list[Row]:
    """Whole examples into rows of `seq_length`, each example a segment of its own. None is cut."""
    bins = best_fit([len(example.tokens) for example in examples], seq_length)
    return [_row([examples[i] for i in members], seq_length, pad_id, source) for members in bins]


def _row(examples: Sequence[Example], seq_length: int, pad_id: int, source: int) -> Row:
    tokens = np.full(seq_length, pad_id, dtype=np.int64)
    labels, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    segments = np.full(seq_length, -1, dtype=np.int64)
    loss_mask = np.zeros(seq_length, dtype=bool)
    start = 0
    for segment, example in enumerate(examples):
        length = len(example.tokens)
        end = start + length
        tokens[start:end] = example.tokens
        loss_mask[start : end - 1] = example.answer[1:]  # position t predicts token t + 1
        labels[start : end - 1] = np.where(example.answer[1:], example.tokens[1:], 0)
        positions[start:end] = np.arange(length)
        segments[start:end] = segment
        start = end
    return Row(tokens, labels, loss_mask, positions, segments, source)


class SFTSource(BatchSource):
    """A batch source over packed rows of named sources. Endless: epochs follow one another."""

    num_samples = None

    def __init__(self, examples: dict[str, Examples], seq_length: int, pad_id: int, seed: int) -> None:
        self.sources, self.seed = list(examples), seed
        packed = [pack(found.train, seq_length, pad_id, i) for i, found in enumerate(examples.values())]
        self._rows = [row for rows in packed for row in rows]
        self.heldout_rows = {
            name: pack(found.heldout, seq_length, pad_id, i) for i, (name, found) in enumerate(examples.items())
        }
        self.fingerprint = _fingerprint(self._rows, seed)
        self._facts = {
            name: f"{len(found.train)} examples ({_fingerprint(rows, seed)[:8]})"
            for (name, found), rows in zip(examples.items(), packed, strict=True)
        }

    @property
    def facts(self) -> dict[str, str]:
        return self._facts

    @property
    def rows_per_epoch(self) -> int:
        return len(self._rows)

    def rows(self, samples: range) -> list[Row]:
        picked = []
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for i in samples:
            if i // len(self._rows) != epoch:
                epoch = i // len(self._rows)
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self._rows))
            picked.append(self._rows[order[i % len(self._rows)]])
        return picked


class _SetAside(Exception):
    """Why a dialogue is not used; the text is the reason counted."""


def _example(name: str, line: bytes, chat: ChatFormat, seq_length: int) -> tuple[Example, str]:
    try:
        record = json.loads(line)
        messages = record["messages"]
        tokens, answer = chat.render(messages)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise _SetAside("bad_json") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _SetAside("bad_messages") from None
    if not answer.any():
        raise _SetAside("no_assistant_turn")
    if len(tokens) > seq_length:
        raise _SetAside("too_long")
    check_supervision(tokens, answer, chat)
    first = next(message["content"] for message in messages if message["role"] == "user")
    return Example(str(record.get("id", name)), tokens, answer), first


def _lines(paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(
                f"data.dialogues names {path}, which is no file; `ls {Path(path).parent}` shows what is there"
            )
        try:
            with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{path}:{number}", line
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} in data.dialogues cannot be read to its end ({error}); restore it") from None


def _fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _fingerprint(rows: Iterable[Row], seed: int) -> str:
    digest = hashlib.sha256(f"seed {seed}".encode())
    for row in rows:
        digest.update(row.tokens.tobytes() + row.loss_mask.tobytes() + row.segments.tobytes())
    return digest.hexdigest()
