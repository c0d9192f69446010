"""Messages of dialogues as data hold them, and the rules that they keep."""

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

from data_pipeline.tokens.chat_template import REASONING_KEYS

Role = Literal["system", "developer", "user", "assistant", "tool"]
OPENING = ("system", "developer")  # roles of the message that may come first
ASKING = (*OPENING, "user")  # roles of the messages to which answers are given
# Which roles may follow a message; a user's question may also come first.
FOLLOWS: dict[str, tuple[str, ...]] = {
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class Message(TypedDict):
    """One turn of a dialogue. An assistant's turn with `train` False, or `weight` 0, is read and not learnt."""

    role: Role
    content: str
    reasoning_content: NotRequired[str]
    train: NotRequired[bool]
    weight: NotRequired[float]


class BrokenDialogue(ValueError):
    """Messages that are not a valid dialogue: `rule` names the broken rule, for counts; the message gives details."""

    def __init__(self, rule: str, by: str) -> None:
        super().__init__(by)
        self.rule = rule


def is_trained(message: Any) -> bool:
    """Whether an assistant's message is learnt. Raises BrokenDialogue if its `train` or `weight` is neither yes nor no.

    On the messages of others, only a `train` or `weight` that leaves them out is allowed.
    """
    said = [(key, message[key]) for key in ("train", "weight") if message.get(key) is not None]
    for key, value in said:
        if value not in (0, 1):
            raise BrokenDialogue(f"a {key} that is neither 0 nor 1", f"{key!r} is {value!r}")
        if value and message.get("role") != "assistant":
            raise BrokenDialogue(f"{key} on a message that is not the assistant's", f"{key!r} is {value!r}")
    return all(value for _, value in said)


def check_list(messages: Any) -> None:
    """Raises BrokenDialogue unless `messages` is a list of objects."""
    if not isinstance(messages, list | tuple):
        raise BrokenDialogue("no list of messages", f"'messages' is {type(messages).__name__}, not a list")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BrokenDialogue("a message is no object", f"message {i} is {type(message).__name__}")


def check_order(messages: Sequence[Any]) -> None:
    """Raises BrokenDialogue for the first fault: a system message may come first, then user and assistant in turn.

    Between a user's question and the answer, the assistant may call tools, whose messages have the role tool.
    """
    check_list(messages)
    first = 1 if messages and messages[0].get("role") in OPENING else 0
    if len(messages) == first:
        raise BrokenDialogue("no user message", "a dialogue needs at least one user message")
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            given = f"{message['role']!r} as its role" if message.get("role") is not None else "no role"
            raise BrokenDialogue("no role", f"message {i} has {given}; roles are {', '.join(FOLLOWS)}")
        if message["role"] not in FOLLOWS:
            said = f"message {i} has role {message['role']!r}, which is none of {', '.join(FOLLOWS)}"
            raise BrokenDialogue("an unknown role", said)
        before = messages[i - 1].get("role") if i else None
        allowed = FOLLOWS[before] if before else (*OPENING, "user") if i == 0 and first else ("user",)
        if message["role"] not in allowed:
            said = f"message {i} has role {message['role']!r} where {' or '.join(map(repr, allowed))} was expected"
            raise BrokenDialogue("roles out of turn", said)
        given = message.get("tool_calls")
        if given and not (isinstance(given, list) and all(isinstance(call, dict) for call in given)):
            said = f"message {i} has 'tool_calls' that are no list of objects, but {given!r}"
            raise BrokenDialogue("tool calls that are no list of objects", said)
        calls = message["role"] == "assistant" and isinstance(given, list)
        if not isinstance(message.get("content"), str) and not (calls and message.get("content") is None):
            found = type(message["content"]).__name__ if "content" in message else "missing"
            raise BrokenDialogue("no text in content", f"message {i} has no text in 'content', which is {found}")
        for key in REASONING_KEYS:
            if not isinstance(message.get(key, ""), str | None):
                found = type(message[key]).__name__
                raise BrokenDialogue("no text in reasoning", f"message {i} has no text in {key!r}, which is {found}")
