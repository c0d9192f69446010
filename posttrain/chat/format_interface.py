"""Interface of a chat format, as training and sampling use it: Trivium's own, or any Jinja template."""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.messages import BrokenDialogue


@dataclass(frozen=True)
class Sample:
    """The tokens of a dialogue, int64 [T], and which of them the model learns to write, bool [T].

    `unstable` says how the dialogue differs from its beginnings, None if it does not: with a template that writes
    earlier turns otherwise than the last one, or a tokenizer that joins a prompt's end with an answer's beginning, each
    answer has a sample of its own. `unprompted` says how the text
    before a learnt answer differs from the prompt that asks for it, None if it does not.
    """

    tokens: np.ndarray
    answer: np.ndarray
    unstable: str | None = None
    unprompted: str | None = None

    def to_write(self) -> "Sample":
        """Returns the sample. Raises BrokenDialogue if a model that learns it never meets the prompt that it learns."""
        if self.unprompted:
            raise BrokenDialogue("an answer that does not follow its prompt", self.unprompted)
        return self


class UntrainedEnd(ValueError):
    """A loss mask that is all zero or all ones, or that leaves out the end of an answer.

    A model trained with it would never learn to stop. `sample` is the dialogue with this mask, if one was made, and
    `location` the record that it comes from, if that is known.
    """

    def __init__(self, text: str, sample: Sample | None = None, location: str = "") -> None:
        super().__init__(text)
        self.sample, self.location = sample, location

    def at(self, key: str, location: str) -> "UntrainedEnd":
        """Returns the same error with the record's location, a file and line that config key `key` names."""
        return UntrainedEnd(f"{key}: {location}: {self}", self.sample, location)


class Chat(abc.ABC):
    """Base class of the chat formats.

    `template` is the format as a Jinja template, and `stop_ids` are the ids that end an answer.
    """

    tokenizer: Tokenizer
    template: str
    stop_ids: tuple[int, ...]

    def check(self) -> None:  # noqa: B027
        """Raises ValueError if the format writes no user's message; Trivium's own writes all."""

    @abc.abstractmethod
    def samples(self, messages: Sequence[Any], tools: Sequence[Mapping[str, Any]] | None = None) -> list[Sample]:
        """Returns the samples of a dialogue: one, unless earlier answers look different in a longer dialogue.

        Raises BrokenDialogue if the messages are not a dialogue, or the template does not take them; UntrainedEnd if
        the end of an answer would not be learnt.
        """

    @abc.abstractmethod
    def render(self, messages: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens int64 [T], answer mask bool [T]) of the whole dialogue, which may end with a user's message.

        The mask is True on the tokens that the model must produce, the end of its turn included. Raises as `samples`.
        """

    @abc.abstractmethod
    def render_prompt(self, messages: Sequence[Any]) -> list[int]:
        """Returns the ids of the dialogue so far and of an opened assistant turn, for the model to continue."""

    def encode_text(self, text: str) -> list[int]:
        """Encodes plain text, in which no control token is one."""
        return list(self.tokenizer.encode(text))

    def answer_length(self, prompt: Sequence[Any], answer: str) -> int:
        """Returns the number of tokens that the model writes to give this answer, the end of its turn included."""
        read = [{**message, "train": False} if message["role"] == "assistant" else message for message in prompt]
        return int(self.render([*read, {"role": "assistant", "content": answer}])[1].sum())

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """Returns the text of a sampled answer, up to the end of its turn; other control tokens are spelled out.

        Ids that only fill up the model's vocabulary, beyond the tokenizer's, have no text.
        """
        tokens = [token for token in tokens if token < self.tokenizer.vocab_size]
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        # A model may sample any id. Control tokens inside an answer stay visible, so that a verifier sees them.
        names = {number: name for name, number in self.tokenizer.special_ids.items()}
        pieces: list[str] = []
        start = 0
        for i in [i for i in range(stop) if tokens[i] in names] + [stop]:
            pieces.append(self.tokenizer.decode(tokens[start:i]) if i > start else "")
            pieces.append(names[tokens[i]] if i < stop else "")
            start = i + 1
        return "".join(pieces)
