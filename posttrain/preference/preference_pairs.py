"""Reads pairs of answers to one prompt, of which one was chosen, and renders both by the chat format.

A record has `prompt`, `chosen` and `rejected`, each a text or a list of messages, and may have a `margin`. Where both
sides are lists that begin with the prompt's messages, `prompt` may be left out. Equal sides, sides that answer
different prompts, broken dialogues and pairs that do not fit a row are set aside.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.chat.dialogues import as_messages, not_learnt, tools_of
from posttrain.chat.format_interface import Chat, UntrainedEnd
from posttrain.chat.messages import BrokenDialogue, Message, check_order
from posttrain.records import TOO_LONG, Records, Unusable, needed, read_split

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Dialogue:
    """Tokens int64 [T] of a rendered dialogue; `answer` bool [T] is True on what follows the prompt in its answers."""

    tokens: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Two dialogues of one prompt, of which `chosen` is to get the higher reward; `margin` is None if none is given."""

    id: str
    chosen: Dialogue
    rejected: Dialogue
    margin: float | None = None

    @property
    def length(self) -> int:
        """Number of tokens of both sides, which are in one row."""
        return len(self.chosen.tokens) + len(self.rejected.tokens)


def read_pairs(
    paths: Sequence[str],
    chat: Chat,
    seq_length: int,
    heldout_share: float,
    max_bad_share: float,
    parts: int = 1,
    key: str = "data.pairs",
    to_write: bool = True,
) -> Records[Pair]:
    """Reads the pairs of the files that config key `key` names; see `read_split` for the rest and the errors.

    `to_write` says whether the answers are for a model that learns to write them, and not only to judge them.
    """

    def parse(location: str, record: dict[str, Any]) -> tuple[list[Pair], str]:
        tools = tools_of(record)
        prompt, chosen, rejected = turns_of(record)
        pair = Pair(
            str(record.get("id", location)),
            rendered_answer(chat, prompt, chosen, tools, to_write),
            rendered_answer(chat, prompt, rejected, tools, to_write),
            _margin(record),
        )
        if np.array_equal(pair.chosen.tokens, pair.rejected.tokens):
            raise Unusable("equal_sides")
        if pair.length > seq_length:
            raise Unusable(TOO_LONG, f"{pair.length} tokens in both sides", pair.length)
        return [pair], first_question(prompt)

    return read_split(paths, key, "pairs", parse, heldout_share, max_bad_share, parts)


def turns_of(record: dict[str, Any]) -> tuple[list[Message], list[Message], list[Message]]:
    """Returns the messages of a record's prompt and of both answers to it. Raises Unusable."""
    chosen, rejected = (as_messages(needed(record, side), "assistant", side) for side in SIDES)
    if _begins_with_prompt(chosen) != _begins_with_prompt(rejected):
        raise Unusable("different_prompts", "only one side begins with the prompt's messages")
    if _begins_with_prompt(chosen):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if shared == len(chosen) == len(rejected):
            raise Unusable("equal_sides")
        while shared and _role(chosen, shared - 1) == "assistant":
            shared -= 1  # one side goes on after a shared answer
        if {_role(side, shared) for side in (chosen, rejected)} != {"assistant"}:
            raise Unusable("different_prompts", f"the sides differ in message {shared}, which is not the assistant's")
        return chosen[:shared], chosen[shared:], rejected[shared:]
    prompt = as_messages(needed(record, "prompt"), "user", "prompt")
    if chosen == rejected:
        raise Unusable("equal_sides")
    return prompt, chosen, rejected


@contextmanager
def unusable() -> Iterator[None]:
    """Raises Unusable for a dialogue that is broken or cannot be encoded, and UntrainedEnd as it is."""
    try:
        yield
    except UntrainedEnd:
        raise
    except BrokenDialogue as broken:
        raise Unusable(f"bad_messages: {broken.rule}", str(broken)) from None
    except ValueError as error:  # half a surrogate pair, say
        raise Unusable("bad_messages: text that cannot be encoded", str(error)) from None


def first_question(messages: Sequence[Any]) -> str:
    """Returns the first user message, by which records are split into training and held-out ones."""
    return next((str(message.get("content")) for message in messages if message.get("role") == "user"), "")


def rendered_answer(
    chat: Chat, prompt: Sequence[Message], answer: Sequence[Message], tools: Any = None, to_write: bool = True
) -> Dialogue:
    """Renders a prompt and the answer to it, which alone is marked. Raises Unusable if they are no dialogue.

    `to_write` says whether the answer is for a model that learns to write it, and not only to judge it.
    """
    with unusable():
        check_order([*prompt, *answer])
        samples = [one for one in chat.samples([*not_learnt(prompt), *answer], tools) if one.answer.any()]
        if samples and to_write:
            samples[-1].to_write()
    if not samples:
        raise Unusable("no_answer", "a side has no turn of the assistant to train on after the prompt")
    return Dialogue(samples[-1].tokens, samples[-1].answer)


def _begins_with_prompt(side: Sequence[Message]) -> bool:
    return _role(side, 0) != "assistant"


def _role(messages: Sequence[Any], index: int) -> str | None:
    return messages[index].get("role") if index < len(messages) else None


def _margin(record: dict[str, Any]) -> float | None:
    margin = record.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise Unusable("bad_margin", f"'margin' is {margin!r}, not a number")
    return float(margin)
