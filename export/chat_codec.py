"""Encodes text and dialogues for generation, with the model's tokenizer and chat template.

The chat template is the run's chat_template.jinja, rendered by transformers' own renderer. No tools and no images.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.tokens.tokenizer import Tokenizer

END = "<|end|>"  # closes a chat turn


class TextCodec:
    """Encodes prompts and dialogues to ids, and decodes ids, for one model.

    `ends` are further ids that end an answer, as the config of an imported model names them.
    """

    def __init__(self, tokenizer: Path, chat_template: str | None = None, ends: Sequence[int] = ()):
        self.tokenizer = Tokenizer.load(tokenizer, complete=False)
        self.specials = self.tokenizer.special_ids
        self.bos_id, self.eos_id = self.tokenizer.bos_id, self.tokenizer.eos_id
        self.pad_id = max(self.tokenizer.pad_id, 0)
        self.chat_template, self._ends = chat_template, ends
        # The longest first, as one may begin with another; without any, a pattern that is nowhere in a text.
        spelled = sorted(self.specials, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, spelled))})" if spelled else "(?!)")

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the end of a document if there is one, and with a chat template the end of a turn."""
        ends = [self.specials[END]] if self.chat_template is not None and END in self.specials else []
        return list(dict.fromkeys([*([self.eos_id] if self.eos_id >= 0 else []), *ends, *self._ends]))

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

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Returns the ids of a dialogue and an opened assistant turn. Raises ValueError without a chat template."""
        return self.encode_rendered(self.render_chat(messages))

    def render_chat(self, messages: list[dict[str, str]], open_answer: bool = True) -> str:
        """Returns a dialogue as the template renders it, with an assistant turn opened at its end.

        Without `open_answer` the last message, the beginning of an answer, is left open instead. Raises ValueError
        without a chat template.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; it was not trained on dialogues")
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self.chat_template,
            add_generation_prompt=open_answer,
            continue_final_message=not open_answer,
        )
        return rendered[0][0]

    def encode_rendered(self, text: str) -> list[int]:
        """Encodes a rendered template: control symbols become their ids, text between them is plain text."""
        ids: list[int] = []
        for part in filter(None, self._split.split(text)):
            ids += [self.specials[part]] if part in self.specials else self.tokenizer.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Returns the text of the ids, without control symbols, and without ids that only fill up the vocabulary."""
        return self.tokenizer.decode([i for i in ids if i < self.tokenizer.vocab_size])
