"""Prompts in a JSONL file, and the records that are written for them.

A line is an object with the key `prompt`, a text, or `messages`, a dialogue for a model with a chat template. Its other
keys are kept. The record of a line is the line with `text`, which follows the prompt, the number of its `tokens`, and
its `ending`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.loader import ConfigError

if TYPE_CHECKING:
    from export.text_model import Continuation, TextModel

WRITTEN = ("text", "tokens", "ending")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class FilePrompt:
    """A line of the file: its number, its object, and the ids of its prompt."""

    number: int
    line: dict[str, Any]
    ids: list[int]

    def record(self, continuation: "Continuation") -> str:
        """Returns the JSON of the line with its continuation."""
        written = (continuation.text, len(continuation.tokens), continuation.ending.value)
        return json.dumps({**self.line, **dict(zip(WRITTEN, written, strict=True))}, ensure_ascii=False)


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Returns the number and the object of each line of a file. Raises ConfigError with the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise ConfigError(f"--prompts {path}: {said}; name a JSONL file with a prompt in each line") from None
    found = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            found.append((number, _parsed(text)))
        except ValueError as error:
            raise _wrong_line(path, number, error) from None
    if not found:
        raise ConfigError(f'--prompts {path} has no prompt; write lines such as {{"prompt": "It was"}}')
    return found


def encode_prompts(path: Path, lines: Sequence[tuple[int, dict[str, Any]]], model: "TextModel") -> list[FilePrompt]:
    """Returns the prompts of the lines of a file. Raises ConfigError with the line that fills the model's context."""
    found = []
    for number, line in lines:
        try:
            ids = _ids(line, model)
            model.room(ids)
        except ValueError as error:
            raise _wrong_line(path, number, error) from None
        found.append(FilePrompt(number, line, ids))
    return found


def _wrong_line(path: Path, number: int, error: ValueError) -> ConfigError:
    return ConfigError(f"--prompts {path}, line {number}: {error}; correct the line, or drop it")


def _parsed(text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(line, dict):
        raise ValueError('not an object such as {"prompt": "It was"}')
    if len(line.keys() & {"prompt", "messages"}) != 1:
        raise ValueError(f"has the keys {sorted(line)}, and needs either prompt or messages")
    if taken := [name for name in WRITTEN if name in line]:
        raise ValueError(f"has the key {taken[0]!r}, which is written for the continuation")
    try:
        json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("has half a surrogate pair, which is no valid Unicode") from None
    if "prompt" in line:
        if not isinstance(line["prompt"], str):
            raise ValueError(f"prompt is {type(line['prompt']).__name__}, not a text")
        return line
    messages = line["messages"]
    is_dialogue = isinstance(messages, list) and all(
        isinstance(one, dict) and one.get("role") in ROLES and isinstance(one.get("content"), str) for one in messages
    )
    if not is_dialogue or not messages:
        raise ValueError(f"messages is not a list of objects with role ({', '.join(ROLES)}) and content")
    return line


def _ids(line: dict[str, Any], model: "TextModel") -> list[int]:
    return model.codec.encode_prompt(line["prompt"]) if "prompt" in line else model.codec.encode_chat(line["messages"])
