"""Text and dialogues to token ids for generation, with the sentencepiece model and the run's chat template.

The template is data (chat_template.jinja of the run directory), rendered by transformers' own renderer.
Leaves out tools and images.
"""

import re
from pathlib import Path
from typing import Any

from data_pipeline.tokens.tokenizer import Tokenizer

END = "<|end|>"  # closes a chat turn


class TextCodec:
    """Prompts and dialogues to ids, and ids to text, for one model."""

    def __init__(self, tokenizer: Path, chat_template: str | None = None):
        self.tokenizer = Tokenizer.load(tokenizer)
        self.specials = self.tokenizer.special_ids
        self.bos_id, self.eos_id = self.tokenizer.bos_id, self.tokenizer.eos_id
        self.pad_id = max(self.tokenizer.pad_id, 0)
        self.chat_template = chat_template
        self._split = re.compile("(" + "|".join(map(re.escape, self.specials)) + ")")

    @property
    def stop_ids(self) -> list[int]:
        """What ends an answer: </s>, and in chat the end of the turn."""
        ends = [self.specials[END]] if self.chat_template is not None and END in self.specials else []
        return [self.eos_id, *ends]

    def encode_prompt(self, text: str) -> list[int]:
        """<s> and the text; control symbols spelled out in it stay plain text."""
        return [self.bos_id, *self.tokenizer.encode(text)]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The dialogue so far and an opened assistant turn. Errors: ValueError without a chat template."""
        if self.chat_template is None:
            raise ValueError("this model has no chat template; it was not trained on dialogues")
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[messages], chat_template=self.chat_template, add_generation_prompt=True
        )
        return self.encode_rendered(rendered[0][0])

    def encode_rendered(self, text: str) -> list[int]:
        """A rendered template to ids: control symbols become theirs, what lies between is plain text."""
        ids: list[int] = []
        for part in filter(None, self._split.split(text)):
            ids += [self.specials[part]] if part in self.specials else self.tokenizer.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, control symbols left out."""
        return self.tokenizer.decode(ids)
