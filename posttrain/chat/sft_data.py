"""SFT data: dialogues and task demonstrations, rendered, checked and packed into rows with document masks.

All data is held in memory. Each source is packed into rows of its own by best fit. Rows of all sources are visited in a
new random order each epoch, so sample i is a pure function of (data, seed, i). Loss is on assistant turns only. There
are no sampling weights (give a source more examples instead) and no preference pairs.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from configs.sft import DialogueConfig
from configs.tasks import DemonstrationConfig
from data_pipeline.mixture.packing import best_fit
from data_pipeline.mixture.rows import Row
from posttrain.chat.chat import Chat, UntrainedEnd
from posttrain.chat.messages import BrokenDialogue, Message
from posttrain.preference.pairs import as_messages
from posttrain.preference.records import Unusable, raw_records
from posttrain.tasks.task import Split, Task, available
from posttrain.tasks.verifiable_tasks import make_task
from pretrain.batch_source import BatchSource, in_random_order

SHOWN = 160  # characters of the details of a broken dialogue in messages
_ANEW = "choose another run.dir for a run with train.seq_length={}"


@dataclass(frozen=True)
class Example:
    """One rendered dialogue; `answer` is True on the tokens to learn, see `Chat.render`."""

    id: str
    tokens: np.ndarray
    answer: np.ndarray


@dataclass
class DialogueExamples:
    """One source's examples by split, and the dialogues that were set aside.

    `set_aside` counts them by reason; `first_of_reason` has file, line and details of the first of each reason.
    """

    train: list[Example] = field(default_factory=list)
    heldout: list[Example] = field(default_factory=list)
    set_aside: Counter[str] = field(default_factory=Counter)
    first_of_reason: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{len(self.train)} to train on, {len(self.heldout)} held out, set aside: {self.reasons or 'none'}"

    @property
    def reasons(self) -> str:
        """The counts by reason, as text, with the first dialogue of each."""
        return ", ".join(
            f"{count} {reason} (first: {self.first_of_reason[reason]})"
            for reason, count in sorted(self.set_aside.items())
        )


def read_data(data: DialogueConfig, chat: Chat, seq_length: int, parts: int = 1) -> dict[str, DialogueExamples]:
    """Returns the dialogues of the config by the name "dialogues", or {} if it has none. Raises as `read_dialogues`."""
    if not data.dialogues:
        return {}
    shares = data.heldout_share, data.max_bad_share
    return {"dialogues": read_dialogues(data.dialogues, chat, seq_length, *shares, parts)}


def read_demonstrations(
    settings: DemonstrationConfig | None, chat: Chat, seed: int, seq_length: int, parts: int = 1
) -> dict[str, DialogueExamples]:
    """Returns solved prompts by the task's name, or {} without a task. Raises as `demonstrations`."""
    if settings is None or not settings.demonstrations:
        return {}
    task = make_task(settings)
    counts = available(task, "train", settings.demonstrations), available(task, "heldout", settings.eval_prompts)
    train = demonstrations(task, chat, seed, "train", counts[0], seq_length, parts)
    heldout = demonstrations(task, chat, seed, "heldout", counts[1], seq_length, parts)
    return {task.name: DialogueExamples(train, heldout)}


def read_dialogues(
    paths: Sequence[str],
    chat: Chat,
    seq_length: int,
    heldout_share: float,
    max_bad_share: float,
    parts: int = 1,
) -> DialogueExamples:
    """Reads and renders dialogues and splits them into training and held-out ones.

    Dialogues with the same first user message are in the same split. Messages suggest values of train.seq_length that
    are multiples of `parts`; where that is 0, the run continues and keeps the length of its rows. Raises ValueError if
    a file is missing, no dialogue is left to train on, or more than `max_bad_share` of them were set aside.
    """
    found, longest, total = DialogueExamples(), 0, 0
    for name, raw in raw_records(paths, "data.dialogues"):
        total += 1
        try:
            made, key = _examples(name, raw, chat, seq_length)
        except _SetAside as broken:
            found.set_aside[broken.reason] += 1
            found.first_of_reason.setdefault(broken.reason, f"{name}{broken.what and ', ' + broken.what[:SHOWN]}")
            longest = max(longest, broken.tokens)
            continue
        (found.heldout if _fraction(key) < heldout_share else found.train).extend(made)
    bad, unit = found.set_aside.total(), math.lcm(8, parts or 1)
    fits = f"set train.seq_length={-(-longest // unit) * unit}, which takes the longest" if longest else ""
    if longest and not parts:
        fits = _ANEW.format(-(-longest // unit) * unit)
    if bad > max_bad_share * total:
        enough = fits and bad - found.set_aside["too_long"] <= max_bad_share * total
        raise ValueError(
            f"{bad} of {total} dialogues were set aside, more than data.max_bad_share = {max_bad_share}: "
            f"{found.reasons}; correct or remove them{', or ' + fits if enough else ''}"
        )
    if not found.train:
        raise ValueError(_nothing_left(found, paths, total, seq_length, fits, heldout_share))
    return found


def _nothing_left(
    found: DialogueExamples, paths: Sequence[str], total: int, seq_length: int, fits: str, heldout_share: float
) -> str:
    where = ", ".join(paths)
    if not total:
        return f"data.dialogues: {where} has no dialogue; name files with a dialogue on each line"
    if found.heldout:
        return (
            f"all {len(found.heldout)} usable dialogues of {where} are held out; lower data.heldout_share = "
            f"{heldout_share}, or add dialogues with other first messages"
        )
    if found.set_aside["too_long"] == total:
        return f"all {total} dialogues of {where} are longer than train.seq_length = {seq_length} tokens; {fits}"
    return f"all {total} dialogues of {where} were set aside: {found.reasons}; correct them{fits and ', or ' + fits}"


def demonstrations(
    task: Task, chat: Chat, seed: int, split: Split, count: int, seq_length: int, parts: int = 1
) -> list[Example]:
    """Returns the first `count` prompts of a split with their right answers; `parts` is as in `read_dialogues`.

    Raises ValueError if one is longer than `seq_length` tokens.
    """
    examples: list[Example] = []
    for index in range(count):
        problem = task.problem(seed, split, index)
        if problem.demonstration is None:
            continue
        messages: list[Message] = [*problem.messages, {"role": "assistant", "content": problem.demonstration}]
        tokens, answer = chat.render(messages)
        examples.append(Example(f"{task.name}/{split}/{index}", tokens, answer))
    longest = max((len(example.tokens) for example in examples), default=0)
    if longest > seq_length:
        fits = f"set train.seq_length={-(-longest // parts) * parts}" if parts else _ANEW.format(longest)
        raise ValueError(
            f"prompts of the task {task.name!r} have up to {longest} tokens with their answers, more than "
            f"train.seq_length = {seq_length}; {fits} or more"
        )
    return examples


def pack(examples: Sequence[Example], seq_length: int, pad_id: int, source: int) -> list[Row]:
    """Packs whole examples into rows of `seq_length` tokens, each example a segment of its own."""
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
    """Batch source of the packed rows of all sources; it never ends, as epochs follow one another."""

    num_samples, reads_ahead = None, True

    def __init__(self, examples: dict[str, DialogueExamples], seq_length: int, pad_id: int, seed: int) -> None:
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
        """Number of examples and hash of the rows of each source."""
        return self._facts

    @property
    def rows_per_epoch(self) -> int:
        """Number of packed rows of all sources."""
        return len(self._rows)

    def rows(self, samples: range) -> list[Row]:
        """Returns the rows of `samples`, which count through all epochs."""
        return in_random_order(self._rows, samples, self.seed)


class _SetAside(Exception):
    """A dialogue that is not used: its reason, the details `what`, and its tokens if it is too long."""

    def __init__(self, reason: str, what: str = "", tokens: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.what, self.tokens = reason, what, tokens


def _examples(name: str, raw: bytes | dict[str, Any], chat: Chat, seq_length: int) -> tuple[list[Example], str]:
    """Returns the examples of a dialogue, and the text by whose hash they are trained on or held out."""
    try:
        record = json.loads(raw) if isinstance(raw, bytes) else raw
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _SetAside("bad_json", str(error)) from None
    if not isinstance(record, dict):
        raise _SetAside("bad_messages: the line is no object", f"it is {type(record).__name__}")
    messages = _messages(record)
    if not isinstance(record.get("tools") or [], list):
        raise _SetAside("bad_tools", f"'tools' is {type(record['tools']).__name__}, not a list")
    try:
        samples = chat.samples(messages, record.get("tools"))
    except BrokenDialogue as broken:
        raise _SetAside(f"bad_messages: {broken.rule}", str(broken)) from None
    except UntrainedEnd:
        raise
    except ValueError as error:  # half a surrogate pair, say
        raise _SetAside("bad_messages: text that cannot be encoded", str(error)) from None
    if not any(sample.answer.any() for sample in samples):
        raise _SetAside("no_assistant_turn")
    if (longest := max(len(sample.tokens) for sample in samples)) > seq_length:
        raise _SetAside("too_long", f"{longest} tokens", longest)
    first = next(message["content"] for message in messages if message["role"] == "user")
    number = str(record.get("id", name))
    ids = [number] if len(samples) == 1 else [f"{number}/{i}" for i in range(len(samples))]
    return [Example(one, s.tokens, s.answer) for one, s in zip(ids, samples, strict=True)], first


def _messages(record: dict[str, Any]) -> Any:
    """Returns a record's messages, or those that its prompt and completion are; answers in a prompt are not learnt."""
    if "messages" in record and (record["messages"] is not None or "prompt" not in record):
        given = record["messages"]
        if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
            return given
        # In a table every message has every key, and no value where it says nothing of it.
        return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in given]
    if "prompt" not in record or "completion" not in record:
        keys = ", ".join(map(repr, list(record)[:8]))
        raise _SetAside("bad_messages: no key 'messages'", f"its keys are {keys}" if keys else "it has no keys")
    try:
        prompt = as_messages(record["prompt"], "user", "prompt")
        completion = as_messages(record["completion"], "assistant", "completion")
    except Unusable as unusable:
        raise _SetAside(unusable.reason, unusable.details) from None
    read = [{**one, "train": False} if one.get("role") == "assistant" else one for one in prompt]
    return [*read, *completion]


def _fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _fingerprint(rows: Iterable[Row], seed: int) -> str:
    digest = hashlib.sha256(f"seed {seed}".encode())
    for row in rows:
        digest.update(row.tokens.tobytes() + row.loss_mask.tobytes() + row.segments.tobytes())
    return digest.hexdigest()
