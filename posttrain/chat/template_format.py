"""Chat format of any Jinja template: the model's own, or one that a config names.

The mask comes from the template's generation blocks, if it has them. Otherwise an answer is what the template writes
after the prompt for it, up to the control token that ends the turn; so the model learns to write just what it must when
it is prompted. Each dialogue is compared with its own beginnings. Some templates write an earlier answer otherwise than
the last one, without its reasoning, say; a dialogue in which that happens becomes one sample for each answer, which
ends with it, as the model will see it. So does one in which an answer shares tokens with the prompt for it: the answer
that ends a sample is then encoded apart from its prompt, since a model that is prompted writes it from there. A
dialogue of which the template leaves anything out is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from typing import Any

import numpy as np

from data_pipeline.tokens.chat_encoder import ANSWER, USER, ChatEncoder, ForgedToken
from data_pipeline.tokens.chat_template import Span, TemplateRefusal
from data_pipeline.tokens.tokenizer import Tokenizer
from posttrain.chat.completeness import dropped
from posttrain.chat.format_interface import Chat, Sample, UntrainedEnd
from posttrain.chat.messages import BrokenDialogue, check_order, is_trained

TODAY = date(2024, 7, 26)  # that a template is told, so that the same data give the same tokens on every day
DROPPED = "text that the template drops"


class TemplateFormat(Chat):
    """Converts messages to tokens and back by a Jinja template.

    Raises ValueError if it is not valid Jinja. `ends` are further ids that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, ends: Sequence[int] = ()) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.encoder = ChatEncoder(tokenizer, template, TODAY)
        stops = [tokenizer.added_ids[name] for name in self.encoder.ends]
        self.stop_ids = tuple(dict.fromkeys([*stops, *ends, *([tokenizer.eos_id] if tokenizer.eos_id >= 0 else [])]))
        self._around = self._written_around()

    def check(self) -> None:
        """Raises ValueError as `ChatEncoder.check`."""
        self.encoder.check()

    def samples(self, messages: Sequence[Any], tools: Sequence[Mapping[str, Any]] | None = None) -> list[Sample]:
        """Returns the samples of a dialogue; see `Chat.samples`. What follows its last answer is left out."""
        check_order(messages)
        learnt = [i for i, one in enumerate(messages) if is_trained(one) and one["role"] == "assistant"]
        if not learnt:
            return []
        messages = messages[: learnt[-1] + 1]
        with _refusals():
            turns = {i: _Turn(self.encoder, messages, i, tools) for i in learnt}
            whole = turns[learnt[-1]]
            unstable = next(filter(None, (turn.differs(whole) for turn in turns.values())), None)
            self._check_complete(messages, turns, divided=unstable is not None, tools=tools)
            for turn in turns.values():
                if turn.fault:
                    raise UntrainedEnd(turn.fault, self._sample(turn.text, turn.spans(turn)))
            unstable = unstable or self._shares_tokens(turns, whole)
            if unstable is None:
                spans = [span for turn in turns.values() for span in turn.spans(whole)]
                unprompted = next(filter(None, (turn.unprompted for turn in turns.values())), None)
                samples = [self._prompted(whole, spans, unprompted=unprompted)]
            else:
                samples = [self._prompted(turn, turn.spans(turn), unstable, turn.unprompted) for turn in turns.values()]
        if whole_marked := next((sample for sample in samples if sample.answer.all()), None):
            raise UntrainedEnd(
                "the loss mask is all ones: the chat template marks the whole dialogue as the model's; let its "
                "generation blocks hold answers alone",
                whole_marked,
            )
        return samples

    def render(self, messages: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens and the mask of the whole dialogue; see `Chat.render`."""
        check_order(messages)
        if messages[-1]["role"] == "assistant" and is_trained(messages[-1]):
            last = self.samples(messages)[-1]
            return last.tokens, last.answer
        with _refusals():
            text, _ = self.encoder.text(messages)
            everything = range(len(messages))
            if missing := dropped(self.encoder, messages, None, text, everything, ()):
                raise BrokenDialogue(DROPPED, missing)
            sample = self._sample(text, [])
        return sample.tokens, sample.answer

    def render_prompt(self, messages: Sequence[Any]) -> list[int]:
        """Returns the ids of the dialogue so far and of an opened assistant turn, for the model to continue."""
        check_order(messages)
        if messages[-1]["role"] == "assistant":
            raise ValueError("a prompt ends with a user message, but the last message is the assistant's")
        return self.encoder.prompt(messages)

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """Returns the text of a sampled answer without what the template writes before and after every answer."""
        text, (before, after) = super().decode_answer(tokens), self._around
        return text.removeprefix(before).removesuffix(after) if text.startswith(before) else text.strip()

    def _shares_tokens(self, turns: Mapping[int, "_Turn"], whole: "_Turn") -> str | None:
        """Returns how an answer before the last one shares tokens with its prompt, None if none does."""
        if len(turns) == 1:
            return None
        encoded = self.encoder.encode(whole.text)
        earlier = (turn for turn in turns.values() if turn is not whole)
        return next((turn.apart for turn in earlier if self.encoder.joins(whole.text, encoded, turn.start)), None)

    def _prompted(
        self, turn: "_Turn", spans: Sequence[Span], unstable: str | None = None, unprompted: str | None = None
    ) -> Sample:
        """Returns a sample of a dialogue that ends with an answer, which begins after the ids of its prompt."""
        text, start = turn.text, turn.start
        encoded = self.encoder.encode(text)
        if self.encoder.joins(text, encoded, start):
            (head, before), (tail, after) = self.encoder.encode(text[:start]), self.encoder.encode(text[start:])
            apart = [*head, *tail], [*before, *((begin + start, end + start) for begin, end in after)]
            if self.tokenizer.decode(apart[0]) == self.tokenizer.decode(encoded[0]):
                encoded, unstable = apart, unstable or turn.apart
            else:  # some tokenizers put a space before every text
                unprompted = unprompted or turn.inseparable
        return self._sample(text, spans, unstable, unprompted, encoded)

    def _sample(
        self,
        text: str,
        spans: Sequence[Span],
        unstable: str | None = None,
        unprompted: str | None = None,
        encoded: tuple[list[int], list[Span]] | None = None,
    ) -> Sample:
        """Returns a sample that learns the tokens that have any character in the spans."""
        ids, ranges = encoded or self.encoder.encode(text)
        answer = np.zeros(len(ids), dtype=bool)
        begins, ends = (np.array([range_[side] for range_ in ranges], dtype=np.int64) for side in (0, 1))
        for start, end in spans:
            first = int(np.argmax(ends > start))
            last = len(ids) - int(np.argmax(begins[::-1] < end))
            answer[first:last] = True
        return Sample(np.array(ids, dtype=np.int64), answer, unstable, unprompted)

    def _check_complete(self, messages: Sequence[Any], turns: Mapping[int, "_Turn"], divided: bool, tools: Any) -> None:
        """Raises BrokenDialogue if the template leaves out a part of a message.

        In a divided dialogue, a learnt answer is looked for in its own sample. Reasoning of answers that are not learnt
        may be left out.
        """
        last = len(messages) - 1
        with_reasoning = [i for i, one in enumerate(messages) if one["role"] != "assistant" or i in turns]
        own = [i for i in turns if divided and i != last]
        shared = [i for i in range(len(messages)) if i not in own]
        for upto, numbers in ((last, shared), *((i, [i]) for i in own)):
            missing = dropped(self.encoder, messages[: upto + 1], tools, turns[upto].text, numbers, with_reasoning)
            if missing:
                raise BrokenDialogue(DROPPED, missing)

    def _written_around(self) -> tuple[str, str]:
        """Returns the text that the template writes in an answer before and after its content."""
        turns = [{"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}]
        try:
            prompt, text = self.encoder.text(turns[:1], open_answer=True)[0], self.encoder.text(turns)[0]
        except TemplateRefusal:
            return "", ""
        end = self.encoder.last_end(text)
        before, _, after = text[_shared(prompt, text) : end].partition(ANSWER)
        closing = next((name for name in self.encoder.controls if after.endswith(name)), "")
        return before, after.removesuffix(closing)


@contextmanager
def _refusals() -> Iterator[None]:
    """Raises BrokenDialogue for what a template refuses to render or a message forges."""
    try:
        yield
    except TemplateRefusal as error:
        raise BrokenDialogue("refused by the chat template", str(error)) from None
    except ForgedToken as error:
        raise BrokenDialogue("text that spells a control token", str(error)) from None


class _Turn:
    """One answer: the text of the dialogue up to it, and the spans of that text that the model learns to write.

    `fault` says why the model would not learn to stop: the template writes no end of the turn, or its generation blocks
    leave the end out. It is None if the model would. `unprompted` is that of the `Sample`.
    """

    def __init__(self, encoder: ChatEncoder, messages: Sequence[Any], number: int, tools: Any) -> None:
        self.number = number
        prompt, _ = encoder.text(messages[:number], open_answer=True, tools=tools)
        self.text, blocks = encoder.text(messages[: number + 1], tools=tools)
        self.start = _shared(prompt, self.text)
        self.unprompted = self._compared(prompt)
        self.end = encoder.last_end(self.text) or 0
        self.blocks = [block for block in blocks if block[1] > block[0]] if encoder.template.marks_answers else None
        self.fault = self._find_fault()

    def spans(self, longer: "_Turn") -> list[Span]:
        """Returns the spans of this answer in the text of a longer dialogue."""
        if longer.blocks is None:
            return [(self.start, self.end)]
        return [(begin, end) for begin, end in longer.blocks if end > self.start and begin < self.end]

    def _compared(self, prompt: str) -> str | None:
        """Returns how the text before the answer departs from the prompt for it; None if nowhere."""
        at = self.start
        if at == len(prompt):
            return None
        return (
            f"the prompt for message {self.number} has {prompt[at : at + 20]!r} where the dialogue has "
            f"{self.text[at : at + 20]!r}; let the template write both alike, or add its reasoning"
        )

    @property
    def _sides(self) -> str:
        at = self.start
        return f"{self.text[max(0, at - 10) : at]!r} before message {self.number} and {self.text[at : at + 10]!r} in it"

    @property
    def apart(self) -> str:
        """Words on an answer that shares tokens with its prompt, and is encoded apart from it."""
        return (
            f"{self._sides} have other tokens in one piece; they are encoded apart, as a model that is prompted reads "
            "and writes them"
        )

    @property
    def inseparable(self) -> str:
        """Words on an answer that shares tokens with its prompt, and that the tokenizer encodes otherwise apart."""
        return (
            f"{self._sides} share a token, and the tokenizer writes a space more where they are apart; let the prompt "
            "end without white space, and the answer begin with it"
        )

    def _find_fault(self) -> str | None:
        if self.end <= self.start:
            self.end = len(self.text)
            return (
                "the chat template writes no control token after an answer, so the model would never learn to stop; "
                "let it write one, such as {{ eos_token }}"
            )
        if self.blocks is None:
            return None
        spans = self.spans(self)
        if not spans:
            return (
                "the loss mask is all zero: the chat template has generation blocks, and none around this answer; "
                "put {% generation %} and {% endgeneration %} around what the assistant says"
            )
        if spans[-1][1] < self.end:
            return (
                f"the chat template writes {self.text[spans[-1][1] : self.end].strip()!r} at the end of an answer, "
                "behind {% endgeneration %}, so the model would never learn to stop; move {% endgeneration %} behind it"
            )
        return None

    def differs(self, longer: "_Turn") -> str | None:
        """Returns how a longer dialogue's text departs from this one's, up to the end of the turn; None if nowhere."""
        mine = self.text[: self.end]
        if longer.text.startswith(mine):
            return None
        at = _shared(mine, longer.text)
        return (
            f"after {mine[max(0, at - 20) : at]!r} there is {mine[at : at + 20]!r} at the end of a dialogue, and "
            f"{longer.text[at : at + 20]!r} in a longer one"
        )


def _shared(one: str, other: str) -> int:
    """Returns how many characters two texts have in common at their beginning."""
    if other.startswith(one):
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def open_chat(tokenizer: Tokenizer, template: str | None = None, ends: Sequence[int] = ()) -> Chat:
    """Returns the chat format of a template; without one, the tokenizer's own, or else Trivium's.

    Raises ValueError if the template is not valid Jinja, or if there is none and the tokenizer lacks Trivium's control
    tokens.
    """
    from posttrain.chat.chat_format import ChatFormat, jinja_template

    template = tokenizer.chat_template if template is None else template
    if template is None or template == jinja_template():
        return ChatFormat(tokenizer)
    return TemplateFormat(tokenizer, template, ends)
