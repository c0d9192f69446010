"""Text of tokens as they come one by one: never half a character, and nothing from a stop string on."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

UNFINISHED = "\ufffd"  # a decoder writes this for bytes that are not, or not yet, a character
# Tokens of the prompt that are decoded with the first new ones, since a token's text may depend on those before it.
PROMPT_TAIL = 6


class CharacterStream:
    """Turns tokens into text, holding back the bytes of a character until it is whole.

    The pieces together are `decode` of all new tokens, or, for a tokenizer that decodes a token by its neighbours, what
    they are after the end of the prompt.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int] = ()):
        self._decode = decode
        self._ids = list(prompt[-PROMPT_TAIL:])
        self._first, self._done = 0, len(self._ids)  # the window that is decoded, and where in it text was passed on

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that it completes, which may be empty."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._first, self._done = self._done, len(self._ids)
        return text

    def finish(self) -> str:
        """Returns the rest, with U+FFFD for bytes that did not become a character."""
        text = self._new_text()
        self._first = self._done = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._first : self._done])
        return self._decode(self._ids[self._first :])[len(before) :]


class TextStream:
    """Text of one continuation up to the first stop string, which is not part of it.

    A stop string may begin in one token and end in another: text that may be the beginning of one is held back. Of
    several, the one that ends first counts, so that the text does not depend on how it is cut into tokens. `stopped` is
    whether a stop string came, and `text` is what has been passed on.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = (), prompt: Sequence[int] = ()):
        assert all(stops), "an empty stop string is everywhere"
        self._characters, self._stops = CharacterStream(decode, prompt), stops
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Takes the next token and returns the text that is certain by now and was not yet."""
        return self._pass_on(self._characters.push(token), ended=False)

    def finish(self) -> str:
        """Returns the text that was held back. After a stop string there is none."""
        return self._pass_on("" if self.stopped else self._characters.finish(), ended=True)

    def _pass_on(self, more: str, ended: bool) -> str:
        text = self._held + more
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            certain = text[: min(found)[1]]
        else:
            keep = 0 if ended else max((_overlap(text, stop) for stop in self._stops), default=0)
            certain, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
