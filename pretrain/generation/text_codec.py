"""Encodes text and dialogues for generation, with the model's tokenizer and chat template.

The chat template is that of the model's own run or folder, whoever wrote it. No tools and no images.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.loader import ConfigError
from data_pipeline.tokens.chat_encoder import ChatEncoder
from data_pipeline.tokens.tokenizer import Tokenizer

THINKING = "enable_thinking"  # the variable by which a template opens an answer with or without reasoning


class TextCodec:
    """Encodes prompts and dialogues to ids, and decodes ids, for one model.

    `ends` are further ids that end an answer, as the config of an imported model names them. `thinking` is what the
    chat template is told about reasoning: nothing if None.
    """

    def __init__(
        self,
        tokenizer: Path,
        chat_template: str | None = None,
        ends: Sequence[int] = (),
        thinking: bool | None = None,
    ):
        self.tokenizer = Tokenizer.load(tokenizer, complete=False)
        self.specials = self.tokenizer.special_ids
        self.bos_id, self.eos_id = self.tokenizer.bos_id, self.tokenizer.eos_id
        self.pad_id = max(self.tokenizer.pad_id, 0)
        self.chat_template, self.thinking, self._ends = chat_template, thinking, ends

    @cached_property
    def chat(self) -> ChatEncoder:
        """The encoder of dialogues. Raises ValueError without a chat template, or if it is not valid Jinja."""
        if self.chat_template is None:
            raise ValueError("this model has no chat template; it was not trained on dialogues")
        variables = {} if self.thinking is None else {THINKING: self.thinking}
        return ChatEncoder(self.tokenizer, self.chat_template, variables=variables)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the end of a document if there is one, and with a chat template the end of a turn."""
        ends = self.chat.ends if self.chat_template is not None else ()
        written = (self.tokenizer.added_ids[name] for name in ends)
        return list(dict.fromkeys([*([self.eos_id] if self.eos_id >= 0 else []), *written, *self._ends]))

    def check_thinking(self, thinking: bool | None) -> None:
        """Tells the chat template about reasoning from now on. Raises ConfigError if it does not know of any."""
        if thinking is not None and not self.chat.template.knows(THINKING):
            option = "--think" if thinking else "--no-think"
            raise ConfigError(
                f"{option}: the model's chat template does not use {THINKING}; leave the option out, or write "
                "/think or /no_think in a message if the model was trained on them"
            )
        if thinking is not None:
            self.chat.variables[THINKING] = self.thinking = thinking

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a text after the symbol that begins a document; control symbols in it stay plain text.

        An empty text without such a symbol begins after the end of a document. Raises ValueError if that has none
        either.
        """
        begin = [self.bos_id] if self.bos_id >= 0 else []
        ids = [*begin, *self.tokenizer.encode(text)] or [self.eos_id]
        if ids[0] < 0:
            raise ValueError("the prompt is empty, and no token of the model begins or ends a text; write a prompt")
        return ids

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Returns the ids of a dialogue and an opened assistant turn.

        Raises ValueError without a chat template, or if the template refuses the dialogue.
        """
        return self.chat.prompt(messages)

    def render_chat(self, messages: list[dict[str, Any]], open_answer: bool = True) -> str:
        """Returns a dialogue as the template renders it, with an assistant turn opened at its end.

        Without `open_answer` the last message, the beginning of an answer, is left open instead. Raises ValueError as
        `encode_chat`.
        """
        return self.chat.text(messages, open_answer=True)[0] if open_answer else self.chat.open_text(messages)

    def encode_rendered(self, text: str) -> list[int]:
        """Encodes a rendered template: control symbols become their ids, text between them is plain text."""
        return self.tokenizer.encode_marked(text)[0]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of the ids, without control symbols, and without ids that only fill up the vocabulary."""
        return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size])
