"""Finds what a chat template leaves out of a dialogue, by rendering it once more with a mark at the end of each part.

A part is the content of a message, its reasoning, the name of a tool that it calls, a value among the arguments of that
call, or the name of a tool that the dialogue offers. That the text of a part is found in the rendered dialogue says
little, since another message may spell it too: its mark is found only where the part itself is written.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.tokens.chat_encoder import ChatEncoder
from data_pipeline.tokens.chat_template import REASONING_KEYS, TemplateRefusal

END_OF_REASONING = "</think>"
_SHOWN = 60  # characters of a part in messages
_NUMBERS = 907_100_000  # and above: what stands in place of a number

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class _Part:
    """Part of a dialogue that a chat template must render: name, path in the messages, value, and text to look for."""

    said: str
    path: Path  # in {"messages": ..., "tools": ...}
    value: Any
    needle: str

    def marked(self, number: int) -> Any:
        """Returns the part's value with a mark in it; a value that is a number becomes another number."""
        return self.value + self.mark(number) if isinstance(self.value, str) else _NUMBERS + number

    def mark(self, number: int) -> str:
        """Returns the mark by which `marked` can be recognized in a rendered dialogue."""
        return f"qz{number}zq" if isinstance(self.value, str) else str(_NUMBERS + number)


def dropped(
    encoder: ChatEncoder,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    text: str,
    numbers: Collection[int],
    with_reasoning: Collection[int],
) -> str | None:
    """Returns what a template leaves out of the messages `numbers` in the rendered dialogue `text`; None if nothing.

    Reasoning is looked for in the messages `with_reasoning` alone.
    """
    parts = [part for i in numbers for part in _parts(i, messages[i], i in with_reasoning)]
    if tools:
        parts += [_Part("the tools of the dialogue", ("tools", *path), name, name) for path, name in _names(tools)]
    squeezed = _squeezed(text)
    for part in parts:
        needle = str(encoder.neutral(part.needle))
        if _squeezed(needle) not in squeezed and _squeezed(_in_json(needle)) not in squeezed:
            return part.said
    written = _written(encoder, messages, tools, parts)
    for part, certain in zip(parts, written, strict=True):
        # Marks may also change what the template makes of other parts, so a part is missed only if its own mark is.
        if not certain and not _written(encoder, messages, tools, [part])[0]:
            return part.said
    return None


def _written(encoder: ChatEncoder, messages: Any, tools: Any, parts: Sequence[_Part]) -> list[bool]:
    """Returns which of the parts a template writes. One that refuses the marks counts as writing a single part."""
    dialogue: Any = {"messages": messages, "tools": tools}
    for number, part in enumerate(parts):
        dialogue = _replaced(dialogue, part.path, part.marked(number))
    try:
        text, _ = encoder.text(dialogue["messages"], tools=dialogue["tools"])
    except TemplateRefusal:
        return [len(parts) == 1] * len(parts)
    return [part.mark(number) in text for number, part in enumerate(parts)]


def _parts(number: int, message: Mapping[str, Any], with_reasoning: bool) -> Iterator[_Part]:
    """Yields the parts of a message that a rendered dialogue must have."""
    where, path_of_message = f"of message {number} ({message['role']})", ("messages", number)
    if content := message.get("content"):
        needle = content if with_reasoning else content.rpartition(END_OF_REASONING)[2]
        yield _Part(f"content {where}: {content[:_SHOWN]!r}", (*path_of_message, "content"), content, needle)
    key = next((key for key in REASONING_KEYS if isinstance(message.get(key), str)), None)
    if with_reasoning and key and message[key].strip():
        reasoning = message[key].rstrip()
        yield _Part(f"reasoning {where}: {reasoning[:_SHOWN]!r}", (*path_of_message, key), reasoning, reasoning)
    given = message.get("tool_calls")
    calls: Sequence[Any] = given if isinstance(given, list | tuple) else ()
    for path, name in _names(calls):
        own = (*path_of_message, "tool_calls", *path)
        yield _Part(f"a tool call {where}: {name[:_SHOWN]!r}", own, name, name)
        for leaf, value in _leaves(_at(calls, (*path[:-1], "arguments"))):
            said = f"an argument of a tool call {where}: {str(value)[:_SHOWN]!r}"
            yield _Part(said, (*own[:-1], "arguments", *leaf), value, value if isinstance(value, str) else "")


def _names(tools: Sequence[Any]) -> Iterator[tuple[Path, str]]:
    """Yields the path and the text of each tool's name in a list of tools, or of calls of tools."""
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            continue
        inner, path = (tool["function"], (i, "function")) if isinstance(tool.get("function"), Mapping) else (tool, (i,))
        if isinstance(inner.get("name"), str) and inner["name"]:
            yield (*path, "name"), inner["name"]


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields the texts and numbers in a value, with the keys that lead to each; true, false and null are left out."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, i))
    elif (isinstance(value, str) and value) or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield path, value


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else value[key]
    return value


def _replaced(value: Any, path: Path, new: Any) -> Any:
    """Returns a copy of a value with another part at `path`."""
    if not path:
        return new
    key, rest = path[0], path[1:]
    if isinstance(value, Mapping):
        return {**value, key: _replaced(value[key], rest, new)}
    return [*value[:key], _replaced(value[key], rest, new), *value[key + 1 :]]  # type: ignore[operator,misc]


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _squeezed(text: str) -> str:
    return "".join(text.split())
