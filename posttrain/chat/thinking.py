"""Switches by which a user asks for an answer with or without reasoning: /think and /no_think, as in Qwen3.

A switch is the last word of a system or user message, and holds until the next one. A model of both kinds learns to
follow it: an answer without reasoning that was asked for gets an empty thinking block, which chat templates write for a
`reasoning_content` that is empty. (Qwen3 Technical Report, 2025, arXiv 2505.09388, section 4.3)
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.tokens.chat_template import REASONING_KEYS
from posttrain.chat.messages import ASKING, BrokenDialogue, is_trained

THINK, NO_THINK = "/think", "/no_think"
_SWITCH = re.compile(r"(?:^|\s)(/no_think|/think)\s*$")
_BLOCK = re.compile(r"<think>(.*?)</think>", re.DOTALL)  # a thinking block within the content


def with_switches(messages: Sequence[Mapping[str, Any]], add: bool) -> list[dict[str, Any]]:
    """Returns the messages of a dialogue, in which answers without reasoning that were asked for have an empty one.

    With `add`, a dialogue that has no switch gets one in the user's message before each answer for which the kind of
    answer changes. Raises BrokenDialogue if a learnt answer is not of the kind that was asked for.
    """
    found = [dict(message) for message in messages]
    add = add and not any(switch_of(message) for message in messages)
    switch: str | None = None
    for begin, end in _turns(messages):
        switch = switch_of(messages[begin]) or switch
        answers = [i for i in range(begin + 1, end) if messages[i]["role"] == "assistant"]
        if messages[begin]["role"] != "user" or not answers:
            continue
        kind = THINK if any(map(reasoning_of, (messages[i] for i in answers))) else NO_THINK
        if add and switch != kind:
            found[begin]["content"] += f" {kind}"
            switch = kind
        if switch and switch != kind and any(is_trained(messages[i]) for i in answers):
            has = "has reasoning" if kind == THINK else "has no reasoning"
            raise BrokenDialogue(f"an answer to {switch} that {has}", f"message {answers[-1]} {has}")
        for i in answers if switch == NO_THINK else ():
            if not _has_block(messages[i]):
                found[i]["reasoning_content"] = ""
    return found


def switch_of(message: Mapping[str, Any]) -> str | None:
    """Returns the switch at the end of a system or user message, None if there is none."""
    if message["role"] not in ASKING:
        return None
    match = _SWITCH.search(message["content"])
    return match[1] if match else None


def reasoning_of(message: Mapping[str, Any]) -> str:
    """Returns the reasoning of an answer, by its own key or in a block of its content; "" if it has none."""
    own = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), None)
    block = _BLOCK.search(message.get("content") or "")
    return (own if own is not None else block[1] if block else "").strip()


def _has_block(message: Mapping[str, Any]) -> bool:
    own = any(isinstance(message.get(key), str) for key in REASONING_KEYS)
    return own or _BLOCK.search(message.get("content") or "") is not None


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Returns the index of each system or user message, with that of the next one."""
    begins = [i for i, message in enumerate(messages) if message["role"] in ASKING]
    return list(zip(begins, [*begins[1:], len(messages)], strict=True))
