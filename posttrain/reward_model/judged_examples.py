"""Examples of reward models as segments of rows: pairs, reasoning steps with a judgement of each, texts with a class.

A pair is judged on the last token of both dialogues, which ends the turn. A step is judged on the last token of the
separator that follows it, and a text or dialogue on its last token.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from configs.reward_model import ExamplesConfig, RewardSection
from posttrain.chat.dialogues import as_messages
from posttrain.chat.format_interface import Chat
from posttrain.preference.group_packing import Segment
from posttrain.preference.preference_pairs import Pair, first_question, read_pairs, unusable
from posttrain.records import TOO_LONG, Records, Unusable, needed, read_split
from posttrain.reward_model.reward_losses import MARGIN

Unit = list[Segment]  # the documents of one example, which stay in one row
FILES = "data.files"


def read_examples(
    data: ExamplesConfig, model: RewardSection, chat: Chat, seq_length: int, parts: int = 1
) -> Records[Unit]:
    """Reads the examples of a config. Raises ValueError as `read_split` does."""
    shares = data.heldout_share, data.max_bad_share
    if model.kind == "preference":
        return _units(read_pairs(data.files, chat, seq_length, *shares, parts, FILES, to_write=False), model)
    kind, parse_one = ("steps", _steps) if model.kind == "process" else ("texts", _text)

    def parse(location: str, record: dict[str, Any]) -> tuple[list[Unit], str]:
        segment, prompt = parse_one(record, model, chat)
        if len(segment.tokens) > seq_length:
            raise Unusable(TOO_LONG, f"{len(segment.tokens)} tokens", len(segment.tokens))
        return [[segment]], prompt

    return read_split(data.files, FILES, kind, parse, *shares, parts)


def _units(pairs: Records[Pair], model: RewardSection) -> Records[Unit]:
    def unit(pair: Pair) -> Unit:
        margin = model.margin if pair.margin is None else pair.margin
        return [_judged(side.tokens, [len(side.tokens) - 1], [0], margin) for side in (pair.chosen, pair.rejected)]

    train, heldout = [unit(pair) for pair in pairs.train], [unit(pair) for pair in pairs.heldout]
    return Records(pairs.kind, train, heldout, pairs.set_aside, pairs.longest, pairs.total)


def _judged(tokens: np.ndarray, positions: Sequence[int], labels: Sequence[int], margin: float = 0.0) -> Segment:
    """Makes a segment that is judged at some positions."""
    mask, classes = np.zeros(len(tokens), dtype=bool), np.zeros(len(tokens), dtype=np.int64)
    mask[list(positions)] = True
    classes[list(positions)] = labels
    return Segment(tokens, classes, mask, {MARGIN: np.full(len(tokens), margin, dtype=np.float32)})


def _steps(record: dict[str, Any], model: RewardSection, chat: Chat) -> tuple[Segment, str]:
    prompt = as_messages(needed(record, "prompt"), "user", "prompt")
    steps, labels = needed(record, "completions" if "completions" in record else "steps"), needed(record, "labels")
    for key, value in (("steps", steps), ("labels", labels)):
        if not isinstance(value, list) or not value:
            raise Unusable(f"bad_{key}", f"{key!r} is {value!r}, not a list with something in it")
    if len(steps) != len(labels):
        raise Unusable("a_step_without_label", f"{len(steps)} steps and {len(labels)} labels")
    tokens: list[int] = _encoded(lambda: chat.render_prompt(prompt))
    ends = []
    for step in steps:
        if not isinstance(step, str):
            raise Unusable("bad_steps", f"a step is {type(step).__name__}, not a text")
        tokens += _encoded(lambda text=step: chat.encode_text(text + model.separator))  # type: ignore[misc]
        ends.append(len(tokens) - 1)
    classes = [_class(label, model.classes) for label in labels]
    return _judged(np.array(tokens, dtype=np.int64), ends, classes), first_question(prompt)


def _text(record: dict[str, Any], model: RewardSection, chat: Chat) -> tuple[Segment, str]:
    label = _class(needed(record, "label"), model.classes)
    if "messages" in record:
        messages = as_messages(record["messages"], "user", "messages")
        with unusable():
            tokens, prompt = chat.render(messages)[0], first_question(messages)
    else:
        text = needed(record, "text")
        if not isinstance(text, str) or not text:
            raise Unusable("bad_text", f"'text' is {text!r}"[:80])
        tokens, prompt = text_tokens(text, chat), text
    return _judged(tokens, [len(tokens) - 1], [label]), prompt


def text_tokens(text: str, chat: Chat) -> np.ndarray:
    """Returns the tokens int64 [T] of a text that is no dialogue: as a document of pretraining, with its end."""
    tokenizer = chat.tokenizer
    ids = _encoded(lambda: chat.encode_text(text))
    begin, end = ([i] if i >= 0 else [] for i in (tokenizer.bos_id, tokenizer.eos_id))
    return np.array([*begin, *ids, *end], dtype=np.int64)


def _encoded(encode: Callable[[], list[int]]) -> list[int]:
    try:
        return encode()
    except ValueError as error:  # a broken dialogue, half a surrogate pair, or a control token
        raise Unusable("bad_text", str(error)) from None


def _class(label: Any, classes: Sequence[str]) -> int:
    """Returns the number of a class that is given by name or number; False and True are the classes 0 and 1."""
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if isinstance(label, int) and 0 <= label < len(classes):
        return int(label)
    raise Unusable("unknown_label", f"label {label!r} is none of {list(classes)}, nor a number from 0")
