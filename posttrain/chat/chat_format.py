"""Trivium's own chat format: messages to token ids with a mask of the tokens to learn, and as a Jinja template.

    <s><|system|>TEXT<|end|><|user|>TEXT<|end|><|assistant|>TEXT<|end|><|user|>...

The system turn is optional; user and assistant turns alternate. There is no white space between control
tokens and text, and no </s> after the last turn: <|end|> is the stop token, and a shorter dialogue is an
exact prefix of a longer one, so sampled tokens are never tokenized again. A prompt for an answer ends with
<|assistant|>.

Reasoning of an answer, its `reasoning_content`, is written as a block. So is reasoning that is empty, which says that
none was wanted:

    <|assistant|><think>\nREASONING\n</think>\nTEXT<|end|>

Only this file makes control tokens. A control token spelled out in a message gets a space after its first character
("<|end|>" becomes "< |end|>"), here and in the Jinja template, and the resulting ids are checked as well. There are no
tool calls and no images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipeline.tokens.chat_template import REASONING_KEYS
from data_pipeline.tokens.tokenizer import FIM_CONTROLS, SPECIALS, Tokenizer
from posttrain.chat.format_interface import Chat, Sample, UntrainedEnd
from posttrain.chat.messages import BrokenDialogue, Message, check_order, is_trained

BOS, END = "<s>", "<|end|>"
# Around the reasoning of an answer. It ends with one line break, since tokenizers may encode two of them in one way at
# the end of a prompt, and in another before text.
THINK = ("<think>\n", "\n</think>\n")
ROLES = ("system", "user", "assistant")
_NEVER_PLAIN = (*SPECIALS, *FIM_CONTROLS)  # the latter also if the tokenizer lacks them


class ChatFormat(Chat):
    """Converts messages to tokens and back, with one tokenizer. Raises ValueError if it lacks a control token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids = {token: tokenizer.piece_to_id(token) for token in SPECIALS}
        missing = [token for token in SPECIALS[1:] if self.ids[token] == self.ids["<unk>"]]
        if missing:
            raise ValueError(
                f"the tokenizer has no {', '.join(missing)}, which Trivium's own chat format needs; name a Jinja "
                "template for this tokenizer by data.chat_template, or train one with `trivium data run`"
            )
        self.end_id, self.assistant_id = self.ids[END], self.ids["<|assistant|>"]
        self.template, self.stop_ids = jinja_template(), (self.end_id,)
        self._control_ids = frozenset(self.ids.values())

    def samples(self, messages: Sequence[Any], tools: Sequence[Mapping[str, Any]] | None = None) -> list[Sample]:
        """Returns the dialogue as one sample; see `Chat.samples`."""
        if tools:
            raise BrokenDialogue("tools", "Trivium's own chat format has no tools; name a template that has")
        tokens, answer = self.render(messages)
        if answer.any():
            check_supervision(tokens, answer, self)
        return [Sample(tokens, answer)]

    def render(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens int64 [T], answer mask bool [T]).

        The mask is True on the tokens that the model must produce: the text of assistant turns and the <|end|> that
        closes each. Raises BrokenDialogue if the messages are not a dialogue.
        """
        check_order(messages)
        tokens, answer = [self.ids[BOS]], [False]
        for i, message in enumerate(messages):
            if message["role"] not in ROLES:
                said = f"message {i} has the role {message['role']!r}, and Trivium's own format has {', '.join(ROLES)}"
                raise BrokenDialogue("a role that the format lacks", f"{said}; name a template that has it")
            if message.get("tool_calls") or not isinstance(message["content"], str):
                said = f"message {i} calls tools, which Trivium's own chat format has not; name a template that has"
                raise BrokenDialogue("tools", said)
            text = self.encode_text(_written(message))
            tokens += [self.ids[f"<|{message['role']}|>"], *text, self.end_id]
            learnt = is_trained(message) and message["role"] == "assistant"
            answer += [False] + [learnt] * (len(text) + 1)
        return np.array(tokens, dtype=np.int64), np.array(answer, dtype=bool)

    def render_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Returns the ids of the dialogue so far and of an opened assistant turn, for the model to continue."""
        if messages and messages[-1]["role"] == "assistant":
            raise ValueError("a prompt ends with a user message, but the last message is the assistant's")
        return [*self.render(messages)[0].tolist(), self.assistant_id]

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """Returns the text of a sampled answer, without an empty thinking block at its beginning."""
        return super().decode_answer(tokens).removeprefix("".join(THINK))

    def answer_length(self, prompt: Sequence[Any], answer: str) -> int:
        """Returns the number of tokens of an answer and the <|end|> that closes it, whatever the prompt."""
        return len(self.encode_text(answer)) + 1

    def encode_text(self, text: str) -> list[int]:
        """Encodes plain text, with control tokens neutralized. Raises ValueError if the ids still contain one."""
        ids = list(self.tokenizer.encode(neutralise(text)))
        if not self._control_ids.isdisjoint(ids):
            raise ValueError(
                f"plain text {text[:80]!r} was encoded to a control token, so the tokenizer is not safe for chat; "
                "start from a model with another"
            )
        return ids


def check_supervision(tokens: np.ndarray, answer: np.ndarray, chat: ChatFormat) -> None:
    """Raises UntrainedEnd if no token is learnt, or if the <|end|> that closes a learnt answer is not."""
    if not answer.any():
        raise UntrainedEnd("the loss mask is all zero: no assistant token would be learnt")
    opened = learnt = False
    for position, token in enumerate(tokens.tolist()):
        learnt = opened and (learnt or bool(answer[position]))
        if token == chat.end_id and opened and learnt and not answer[position]:
            raise UntrainedEnd(
                f"the <|end|> at position {position} that closes an assistant turn is not in the loss mask; "
                "the model would never learn to stop"
            )
        if token in (chat.assistant_id, chat.end_id):
            opened = token == chat.assistant_id
    if opened:
        raise UntrainedEnd("the last assistant turn is not closed by <|end|>; the model would never learn to stop")


def _written(message: Message) -> str:
    """Returns the text of a message, with the reasoning of an answer before it."""
    given = (message[key] for key in REASONING_KEYS if message.get(key) is not None)  # type: ignore[literal-required]
    reasoning = next(given, None) if message["role"] == "assistant" else None
    if reasoning is None:
        return message["content"]
    # For the same reason the text after it begins without white space.
    return reasoning.strip("\n").join(THINK) + message["content"].lstrip()


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
    neutral = "".join(f" | replace('{token}', '{_broken(token)}')" for token in _NEVER_PLAIN)
    content, answer = f"m['content']{neutral}", f"m['content'].lstrip(){neutral}"
    reasoning = f"m['reasoning_content'].strip('\\n'){neutral}"
    begin, end, empty = (repr(mark) for mark in (*THINK, "".join(THINK)))
    return (
        "{{ '<s>' }}"
        "{% set first = 1 if messages[0]['role'] == 'system' else 0 %}"
        "{% for m in messages %}"
        "{% set turn = ['user', 'assistant'][(loop.index0 - first) % 2] %}"
        "{% if m['role'] != ('system' if loop.index0 < first else turn) %}"
        "{{ raise_exception('an optional system message, then user and assistant in turn') }}{% endif %}"
        "{% if m['role'] == 'assistant' %}"
        "{{ '<|assistant|>' }}{% generation %}"
        "{% if m['reasoning_content'] is string %}"
        f"{{{{ {begin} }}}}{{{{ {reasoning} }}}}{{{{ {end} }}}}{{{{ {answer} }}}}"
        "{% else %}"
        f"{{{{ {content} }}}}"
        "{% endif %}"
        "{{ '<|end|>' }}{% endgeneration %}"
        "{% else %}"
        f"{{{{ '<|' + m['role'] + '|>' }}}}{{{{ {content} }}}}{{{{ '<|end|>' }}}}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}"
        f"{{% if enable_thinking is defined and enable_thinking is false %}}{{{{ {empty} }}}}{{% endif %}}"
        "{% endif %}"
    )


def _broken(token: str) -> str:
    return token[0] + " " + token[1:]
