"""Text and dialogues to token ids for generation, with the sentencepiece model and the run's chat template.

The template is data (chat_template.jinja of the run directory), rendered by transformers' own renderer.
Leaves out tools and images.
"""

import re
from pathlib import Path

import sentencepiece

from export.tokenizer import read_model, special_ids

END = "<|end|>"  # closes a chat turn


class TextCodec:
    """Text to ids and back for one model. `specials` are control symbols by name."""

    def __init__(self, tokenizer: Path, chat_template: str | None = None):
        model = read_model(tokenizer)
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        self.specials = special_ids(model)
        self.bos_id, self.eos_id, self.pad_id = (
            model.trainer_spec.bos_id,
            model.trainer_spec.eos_id,
            max(model.trainer_spec.pad_id, 0),
        )
        self.chat_template = chat_template
        self._split = re.compile("(" + "|".join(map(re.escape, self.specials)) + ")")

    @property
    def stop_ids(self) -> list[int]:
        """What ends an answer: </s>, and in chat the end of the turn."""
        ends = [self.specials[END]] if self.chat_template is not None and END in self.specials else []
        return [self.eos_id, *ends]

    def encode_prompt(self, text: str) -> list[int]:
        """<s> and the text; control symbols spelled out in it stay plain text."""
        return [self.bos_id, *self.processor.encode(text)]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The dialogue so far and an opened assistant turn. Errors: ValueError without a chat template."""
        if self.chat_template is None:
            raise ValueError("this model has no chat template; it was not trained on dialogues")
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template(
            conversations=[messages], chat_template=self.chat_template, add_generation_prompt=True
        )
        return self.encode_rendered(rendered[0])

    def encode_rendered(self, text: str) -> list[int]:
        """A rendered template to ids: control symbols become theirs, what lies between is plain text."""
        ids: list[int] = []
        for part in filter(None, self._split.split(text)):
            ids += [self.specials[part]] if part in self.specials else self.processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, control symbols left out."""
        hidden = set(self.specials.values())
        return self.processor.decode([i for i in ids if i not in hidden])
