"""Chat format: messages to token ids with a mask of the tokens to learn, and as a Jinja template for transformers.

    <s><|system|>TEXT<|end|><|user|>TEXT<|end|><|assistant|>TEXT<|end|><|user|>...

The system turn is optional; user and assistant turns alternate. There is no white space between control
tokens and text, and no </s> after the last turn: <|end|> is the stop token, and a shorter dialogue is an
exact prefix of a longer one, so sampled tokens are never tokenized again. A prompt for an answer ends with
<|assistant|>.

Only this file makes control tokens. A control token spelled out in a message gets a space after its first character
("<|end|>" becomes "< |end|>"), here and in the Jinja template, and the resulting ids are checked as well. There are no
tool calls and no images.
"""

from collections.abc import Sequence
from typing import Literal, TypedDict

import numpy as np

from data_pipeline.tokens.tokenizer import FIM_CONTROLS, SPECIALS, Tokenizer

Role = Literal["system", "user", "assistant"]
BOS, END = "<s>", "<|end|>"
_NEVER_PLAIN = (*SPECIALS, *FIM_CONTROLS)  # the latter also if the tokenizer lacks them


class Message(TypedDict):
    """One turn of a dialogue."""

    role: Role
    content: str


class BrokenDialogue(ValueError):
    """Messages that are not a valid dialogue: `rule` names the broken rule, for counts; the message gives details."""

    def __init__(self, rule: str, by: str) -> None:
        super().__init__(by)
        self.rule = rule


class ChatFormat:
    """Converts messages to tokens and back, with one tokenizer. Raises ValueError if it lacks a control token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = {token: tokenizer.piece_to_id(token) for token in SPECIALS}
        missing = [token for token in SPECIALS[1:] if self.ids[token] == self.ids["<unk>"]]
        if missing:
            raise ValueError(
                f"the tokenizer has no {', '.join(missing)}, which the chat format needs; "
                "train it with `trivium data run`"
            )
        self.end_id, self.assistant_id = self.ids[END], self.ids["<|assistant|>"]
        self._control_ids = frozenset(self.ids.values())

    def render(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens int64 [T], answer mask bool [T]).

        The mask is True on the tokens that the model must produce: the text of assistant turns and the <|end|> that
        closes each. Raises BrokenDialogue if the messages are not a dialogue.
        """
        check_order(messages)
        tokens, answer = [self.ids[BOS]], [False]
        for message in messages:
            text = self.encode_text(message["content"])
            tokens += [self.ids[f"<|{message['role']}|>"], *text, self.end_id]
            answer += [False] + [message["role"] == "assistant"] * (len(text) + 1)
        return np.array(tokens, dtype=np.int64), np.array(answer, dtype=bool)

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of the dialogue so far and of an opened assistant turn, for the model to continue."""
        if messages and messages[-1]["role"] == "assistant":
            raise ValueError("a prompt ends with a user message, but the last message is the assistant's")
        return [*self.render(messages)[0].tolist(), self.assistant_id]

    def encode_text(self, text: str) -> list[int]:
        """Encodes plain text, with control tokens neutralized. Raises ValueError if the ids still contain one."""
        ids = list(self.tokenizer.encode(neutralise(text)))
        if not self._control_ids.isdisjoint(ids):
            raise ValueError(
                f"plain text {text[:80]!r} was encoded to a control token; the tokenizer is not safe for chat"
            )
        return ids

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """Returns the text of a sampled answer, up to its <|end|>; other control tokens in it are spelled out."""
        tokens = list(tokens)
        if self.end_id in tokens:
            tokens = tokens[: tokens.index(self.end_id)]
        # A model may sample any id. Control tokens inside an answer stay visible, so that a verifier sees them.
        names = {token_id: name for name, token_id in self.ids.items()}
        pieces: list[str] = []
        start = 0
        for i, token in enumerate([*tokens, self.end_id]):
            if token in names:
                pieces.append(self.tokenizer.decode(tokens[start:i]) if i > start else "")
                pieces.append(names[token] if i < len(tokens) else "")
                start = i + 1
        return "".join(pieces)


def neutralise(text: str) -> str:
    """Returns the text with a space after the first character of every control token spelled out in it."""
    for token in _NEVER_PLAIN:
        text = text.replace(token, _broken(token))
    return text


def jinja_template() -> str:
    """Returns the format as a Jinja template for transformers' `chat_template`.

    Its rendered text, tokenized with special tokens, gives the ids of `ChatFormat.render`, or of `render_prompt` with
    add_generation_prompt. Its `generation` blocks mark the answer mask.
    """
    content = "m['content']" + "".join(f" | replace('{token}', '{_broken(token)}')" for token in _NEVER_PLAIN)
    return (
        "{{ '<s>' }}"
        "{% set first = 1 if messages[0]['role'] == 'system' else 0 %}"
        "{% for m in messages %}"
        "{% set turn = ['user', 'assistant'][(loop.index0 - first) % 2] %}"
        "{% if m['role'] != ('system' if loop.index0 < first else turn) %}"
        "{{ raise_exception('an optional system message, then user and assistant in turn') }}{% endif %}"
        "{% if m['role'] == 'assistant' %}"
        "{{ '<|assistant|>' }}{% generation %}"
        f"{{{{ {content} }}}}{{{{ '<|end|>' }}}}"
        "{% endgeneration %}"
        "{% else %}"
        f"{{{{ '<|' + m['role'] + '|>' }}}}{{{{ {content} }}}}{{{{ '<|end|>' }}}}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )


def _broken(token: str) -> str:
    return token[0] + " " + token[1:]


def check_order(messages: Sequence[Message]) -> None:
    """Raises BrokenDialogue for the first fault in the order: an optional system message, then user and assistant."""
    if not isinstance(messages, list | tuple):
        raise BrokenDialogue("no list of messages", f"'messages' is {type(messages).__name__}, not a list")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise BrokenDialogue("a message is no object", f"message {i} is {type(message).__name__}")
    first = 1 if messages and messages[0].get("role") == "system" else 0
    if len(messages) == first:
        raise BrokenDialogue("no user message", "a dialogue needs at least one user message")
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[(i - first) % 2] if i >= first else "system"
        if message.get("role") != expected:
            role = f"role {message.get('role')!r}" if "role" in message else "no role"
            raise BrokenDialogue("roles out of turn", f"message {i} has {role} where {expected!r} was expected")
        if "content" not in message or not isinstance(message["content"], str):
            found = type(message["content"]).__name__ if "content" in message else "missing"
            raise BrokenDialogue("no text in content", f"message {i} has no text in 'content', which is {found}")
