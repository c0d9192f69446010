"""Dialogues to token ids, by a chat template and the tokenizer of its model.

A rendered dialogue is encoded once, as a whole, so its ids are those of transformers' `apply_chat_template`. A control
token is one that the tokenizer calls special, or that the template writes around a plain dialogue, apart from pairs of
tags such as <think> and </think>. Only the template makes control tokens: one that is spelled out in a message gets a
space after its first character ("<|im_end|>" becomes "< |im_end|>"), and the resulting ids are checked as well.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from data_pipeline.tokens.chat_template import ChatTemplate, Messages, Span, TemplateRefusal
from data_pipeline.tokens.tokenizer import Tokenizer

SYSTEM = "You are a helpful assistant."  # for a template that takes no dialogue without a system message
USER, ANSWER, NEXT = "qzuserqz", "qzanswerqz", "qznextqz"  # contents of a dialogue that shows how a template writes one


class ForgedToken(ValueError):
    """A dialogue whose messages would become a control token."""


class ChatEncoder:
    """Renders and encodes dialogues. Raises ValueError if the template is not valid Jinja.

    `controls` are the control tokens, and `ends` those that the template writes after an answer, by their spelling.
    `today` is as in ChatTemplate, and `variables` are given to the template each time, such as `enable_thinking`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str,
        today: date | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.variables = tokenizer, dict(variables or {})
        self.template = ChatTemplate(source, tokenizer.symbols, today)
        special = [name for name in tokenizer.special_ids if name]
        names = dict.fromkeys([*special, *(name for name in tokenizer.added_ids if _is_mark(name))])
        written = _Written.of(self.template, self.variables, list(names))
        tags = {name for name in names if name not in special and _is_tag(name, tokenizer.added_ids)}
        self.controls = tuple(dict.fromkeys([*special, *(name for name in written.around if name not in tags)]))
        self.ends = tuple(name for name in written.ends if name not in tags)
        longest = sorted(self.controls, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest)) if longest else "(?!)")
        # A word that the tokenizer does not know becomes <unk>, which forges nothing unless it ends an answer, too.
        ending = {tokenizer.eos_id, *(tokenizer.added_ids[name] for name in self.ends)}
        harmless = {tokenizer.unk_id} - ending
        self._control_ids = frozenset(tokenizer.added_ids[name] for name in self.controls) - harmless

    def check(self) -> None:
        """Raises ValueError if the template writes no user's message, whether or not a system message comes first."""
        user, refused = {"role": "user", "content": USER}, None
        for messages in ([user], [{"role": "system", "content": USER}, user]):
            try:
                if self.prompt(messages):
                    return
                refused = refused or "writes nothing of a user's message"
            except TemplateRefusal as error:
                refused = refused or f"refuses a user's message ({error})"
        raise ValueError(f"the chat template {refused}; correct it")

    def question(self, text: str) -> list[dict[str, str]]:
        """Returns a dialogue of one user's message, after a system message only if the template does not go without."""
        user = {"role": "user", "content": text}
        try:
            self.text([user], open_answer=True)
        except TemplateRefusal:
            return [{"role": "system", "content": SYSTEM}, user]
        return [user]

    def text(
        self, messages: Messages, open_answer: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, list[Span]]:
        """Returns the text of a dialogue and the spans of its generation blocks, as `ChatTemplate.render`."""
        return self.template.render(self.neutral(messages), open_answer, self.neutral(tools), **self.variables)

    def open_text(self, messages: Messages) -> str:
        """Returns the text of a dialogue whose last message is left open, as `ChatTemplate.render_open`."""
        return self.template.render_open(self.neutral(messages), **self.variables)

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Returns the ids of a rendered dialogue, and the span of each in characters.

        Raises ForgedToken if there are more control tokens than the text spells, which are the template's.
        """
        ids, spans = self.tokenizer.encode_marked(text)
        made = sum(one in self._control_ids for one in ids)
        if made > sum(1 for _ in self._control.finditer(text)):
            raise ForgedToken("the text of a message was encoded to a control token; take it out of the message")
        return ids, spans

    def joins(self, text: str, encoded: tuple[Sequence[int], Sequence[Span]], cut: int) -> bool:
        """Tells whether a text, encoded whole, has other ids before character `cut` than that part alone has."""
        ids, spans = encoded
        # What is before a control token has no influence on the ids after it.
        last = max((found.start() for found in self._control.finditer(text, 0, cut)), default=0)
        alone, _ = self.encode(text[last:cut])
        first = bisect_left(spans, last, key=lambda span: span[0])
        return list(ids[first : first + len(alone)]) != alone

    def prompt(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Returns the ids of a dialogue and of an opened assistant's turn."""
        return self.encode(self.text(messages, open_answer=True, tools=tools)[0])[0]

    def neutral(self, value: Any) -> Any:
        """Returns messages, or a part of them, in which no text spells a control token."""
        if isinstance(value, str):
            return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", value)
        if isinstance(value, Mapping):
            return {key: self.neutral(part) for key, part in value.items()}
        return [self.neutral(part) for part in value] if isinstance(value, list | tuple) else value

    def last_end(self, text: str) -> int | None:
        """Returns where the control token ends that closes the answer at the end of `text`; None if none does.

        Other control tokens and white space may follow it.
        """
        found: list[tuple[str, int]] = []
        rest = text.rstrip()
        while name := next((name for name in self.controls if rest.endswith(name)), None):
            found.append((name, len(rest)))
            rest = rest[: -len(name)].rstrip()
        found.reverse()
        return next((end for name, end in found if name in self.ends), found[0][1] if found else None)


class _Written:
    """The tokens that a template writes around the messages of a plain dialogue.

    `around` are those outside answers, and `ends` those that come first after an answer.
    """

    def __init__(self, around: Sequence[str], ends: Sequence[str]) -> None:
        self.around, self.ends = list(dict.fromkeys(around)), list(dict.fromkeys(ends))

    @classmethod
    def of(cls, template: ChatTemplate, variables: Mapping[str, Any], names: Sequence[str]) -> "_Written":
        """Renders a plain dialogue; finds nothing if the template does not take one."""
        turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
        try:
            longer, _ = template.render([*turns, {"role": "user", "content": NEXT}], **variables)
            whole, _ = template.render(turns, **variables)
        except TemplateRefusal:
            return cls([], [])
        mark = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
        head, _, tail = longer.partition(ANSWER)
        opening, between = mark.findall(head.partition(USER)[0]), mark.findall(tail.partition(NEXT)[0])
        last = mark.findall(whole.partition(ANSWER)[2])
        # Where the template writes nothing after an answer, the next turn begins right there.
        ends = [*last[:1], *(name for name in between[:1] if name not in opening or name in last)]
        return cls([*opening, *mark.findall(head), *between, *last], ends)


def _is_mark(name: str) -> bool:
    """Tells whether a token looks like one that a template writes, and not like a word or white space."""
    return len(name) > 2 and not name[0].isalnum() and not name[-1].isalnum() and not name.isspace()


def _is_tag(name: str, names: Mapping[str, int]) -> bool:
    """Tells whether a token is one of a pair, <name> and </name>, neither of which is a control token by itself."""
    inner = name.removeprefix("</").removeprefix("<").removesuffix(">")
    return f"<{inner}>" in names and f"</{inner}>" in names
