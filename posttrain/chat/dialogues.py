"""Reads dialogues as examples for fine-tuning: rendered, checked, and split.

All data is held in memory. Dialogues that are broken or too long are set aside and counted, never cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.sft import DialogueConfig
from posttrain.chat.format_interface import Chat, Sample, UntrainedEnd
from posttrain.chat.messages import BrokenDialogue, Message, check_order
from posttrain.chat.thinking import with_switches
from posttrain.records import TOO_LONG, Records, Unusable, read_split, said_keys

KEY = "data.dialogues"
ANOTHER_TEMPLATE = "in a copy of the model's chat template, and name its file as data.chat_template"


@dataclass(frozen=True)
class Example:
    """One rendered dialogue; `answer` is True on the tokens to learn, see `Chat.render`.

    `location` is the file and line that it comes from, or the prompt of a task. `unstable` is that of the `Sample`.
    """

    id: str
    tokens: np.ndarray
    answer: np.ndarray
    location: str = ""
    unstable: str | None = None

    @classmethod
    def of(cls, name: str, location: str, sample: Sample) -> "Example":
        """Makes the example of a sample."""
        return cls(name, sample.tokens, sample.answer, location, sample.unstable)


def read_data(data: DialogueConfig, chat: Chat, seq_length: int, parts: int = 1) -> dict[str, Records[Example]]:
    """Returns the dialogues of the config by the name "dialogues", or {} if it has none. Raises as `read_dialogues`."""
    if not data.dialogues:
        return {}
    shares = data.heldout_share, data.max_bad_share
    try:
        found = read_dialogues(data.dialogues, chat, seq_length, *shares, parts, data.thinking_switches)
        return {"dialogues": found}
    except UntrainedEnd as error:
        where = f"in {data.chat_template}" if data.chat_template else ANOTHER_TEMPLATE
        raise UntrainedEnd(f"{error} {where}", error.sample, error.location) from None


def read_dialogues(
    paths: Sequence[str],
    chat: Chat,
    seq_length: int,
    heldout_share: float,
    max_bad_share: float,
    parts: int = 1,
    switches: bool = False,
) -> Records[Example]:
    """Reads and renders dialogues and splits them into training and held-out ones. Raises as `read_split`.

    Dialogues with the same first user message are in the same split. With `switches`, those that have none get /think
    or /no_think.
    """

    def parse(location: str, record: dict[str, Any]) -> tuple[list[Example], str]:
        messages = _messages(record)
        samples = _samples(chat, messages, tools_of(record), switches)
        if (longest := max(len(sample.tokens) for sample in samples)) > seq_length:
            raise Unusable(TOO_LONG, f"{longest} tokens", longest)
        first = next(message["content"] for message in messages if message["role"] == "user")
        number = str(record.get("id", location))
        names = [number] if len(samples) == 1 else [f"{number}/{i}" for i in range(len(samples))]
        return [Example.of(name, location, sample) for name, sample in zip(names, samples, strict=True)], first

    return read_split(paths, KEY, "dialogues", parse, heldout_share, max_bad_share, parts)


def as_messages(value: Any, role: Any, key: str) -> list[Message]:
    """Returns a list of messages as it is, and a text as one message of `role`. Raises Unusable for other values."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return [{name: part for name, part in message.items() if part is not None} for message in value]  # type: ignore[misc]
    found = "an empty list" if value == [] else f"{type(value).__name__}"
    raise Unusable(f"bad_{key}", f"{key!r} is {found}, neither a text nor a list of messages")


def tools_of(record: dict[str, Any]) -> list[Any]:
    """Returns the tools that a record offers, [] if none. Raises Unusable if they are no list of objects."""
    tools = record.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("bad_tools", f"'tools' is no list of objects, but {tools!r}")
    return tools


def not_learnt(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages with all answers marked as read and not learnt."""
    return [{**one, "train": False} if one.get("role") == "assistant" else one for one in messages]


def _samples(chat: Chat, messages: Any, tools: Any, switches: bool) -> list[Sample]:
    """Returns the samples of a dialogue, at least one. Raises Unusable, and UntrainedEnd."""
    try:
        check_order(messages)
        given = with_switches(messages, switches)
        samples = [sample.to_write() for sample in chat.samples(given, tools) if sample.answer.any()]
    except BrokenDialogue as broken:
        raise Unusable(f"bad_messages: {broken.rule}", str(broken)) from None
    except UntrainedEnd:
        raise
    except ValueError as error:  # half a surrogate pair, say
        raise Unusable("bad_messages: text that cannot be encoded", str(error)) from None
    if samples:
        return samples
    if any(message["role"] == "assistant" for message in messages):
        raise Unusable("no_turn_to_train", "'train' or 'weight' leaves out every turn of the assistant")
    raise Unusable("no_assistant_turn")


def _messages(record: dict[str, Any]) -> Any:
    """Returns a record's messages, or those that its prompt and completion are; answers in a prompt are not learnt."""
    if "messages" in record:
        given = record["messages"]
        if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
            return given
        # In a table every message has every key, and no value where it says nothing of it.
        return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in given]
    if "prompt" not in record or "completion" not in record:
        raise Unusable("bad_messages: no key 'messages'", said_keys(record))
    prompt = as_messages(record["prompt"], "user", "prompt")
    return [*not_learnt(prompt), *as_messages(record["completion"], "assistant", "completion")]
