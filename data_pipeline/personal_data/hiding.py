"""Personal data beside the text: in URLs, ids, file names and metadata, which are short and have forms of their own.

An address is looked at with its escapes (`%40`, `%2540`) undone and its parts apart, so that what follows a "=" or "/"
is seen as it would be in a text. Of an object every string and whole number is looked at, next to the name of its field
(`{"phone": 4155550123}`), and every name. What is found is the same as in texts: see `find`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.cuts import KINDS, Kind
from data_pipeline.personal_data.find import PLACEHOLDERS, find

_ESCAPE = re.compile(r"%([0-7][0-9A-Fa-f])")
_APART = str.maketrans("/=&?;|,\\", "\n" * 8)  # no kind of personal data goes over the end of a line
# Where the name of a file ends: jane@uni.org.txt is an address and an ending.
_ENDING = re.compile(
    r"\.(?=(?:txt|jsonl?|html?|xml|pdf|zip|gz|zst|parquet|warc|eml|mbox|csv|png|jpe?g|gif|svg|webp)(?:[\n.]|\Z))", re.I
)
# Names of fields with telephone numbers, such as contact_phone_2, homePhone and phones, are read as words are in texts.
_OF_NUMBERS = re.compile(r"(?i)tel|phone|mobile|fax|whatsapp")
_BETWEEN_WORDS = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])")
_PLURAL = re.compile(r"(phone|mobile|number)s\b", re.I)
_EXACT = 2.0**53  # below which a float holds every integer
_MOST_ESCAPED = 3  # times that a sign may be escaped, in an address within an address
# Without one of these nothing is found: most short strings are done with here, in little time.
_POSSIBLE = re.compile(
    r"@|[\"']|PRIVATE KEY|[0-9](?:[^0-9A-Za-z/\n]{0,3}[0-9]){6}|\+[0-9]|[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]"
    r"|[0-9A-Fa-f]:[0-9A-Fa-f]{0,4}:|A[KS]IA|gh[pousr]_|github_pat|glpat-|xox|hooks\.slack|AIza|[rs]k_live|sk-|hf_|npm_"
    r"|pypi-|SG\.|eyJ"
)


def holds_personal_data(text: str) -> bool:
    """Whether an id, URL or file name does."""
    return hide(text) != text


def hide(text: str) -> str:
    """`text`, a URL or other short string, with placeholders for all personal data in it."""
    return Hiding().text(text)


@dataclass(frozen=True)
class Hiding:
    """Which `kinds` of personal data are hidden, and what stands in their place: `texts`."""

    kinds: Collection[Kind] = KINDS
    texts: Mapping[Kind, str] = field(default_factory=lambda: PLACEHOLDERS)
    private_ips: bool = False

    def text(self, text: str, name: str = "") -> str:
        """`text`, a URL or other short string under `name`, with the kinds that are found in it hidden."""
        parts, position = [], 0
        for start, end, kind in self._found(text, name):
            parts += [text[position:start], self.texts[kind]]
            position = end
        return "".join([*parts, text[position:]])

    def value(self, value: Any, name: str = "") -> Any:
        """A JSON value, with the same done to every string and whole number in it, however deep, and to names.

        Names of fields that become the same are numbered.
        """
        if isinstance(value, str):
            return self.text(value, name)
        if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:  # as tables with gaps have integers
            hidden = self.text(str(int(value)), name)
            return value if hidden == str(int(value)) else hidden
        if isinstance(value, int) and not isinstance(value, bool):
            hidden = self.text(str(value), name)
            return value if hidden == str(value) else hidden
        if isinstance(value, list):
            return [self.value(one, name) for one in value]
        if not isinstance(value, dict):
            return value
        found: dict[str, Any] = {}
        for key, inner in value.items():
            shown = self.text(key)
            number = 1
            while (again := shown if number == 1 else f"{shown} ({number})") in found:
                number += 1
            found[again] = self.value(inner, key)
        return found

    def _found(self, text: str, name: str) -> list[tuple[int, int, Kind]]:
        """What is found in the text as it stands, and with escapes undone and its parts on lines of their own."""
        if _OF_NUMBERS.search(name):
            name = _PLURAL.sub(r"\1", _BETWEEN_WORDS.sub(" ", name)).strip()
        label = f"{name}: " if name else ""
        plain, origins = _unescaped(text)
        parts = _ENDING.sub("\n", plain.translate(_APART))
        spans: list[tuple[int, int, Kind]] = []
        for looked_at, at in ((text, range(len(text) + 1)), *([(parts, origins)] if parts != text else [])):
            if _POSSIBLE.search(looked_at):
                for start, end, kind in find(label + looked_at, self.kinds, self.private_ips):
                    if end > len(label):
                        spans.append((at[max(start - len(label), 0)], at[end - len(label)], kind))
        apart: list[tuple[int, int, Kind]] = []
        for start, end, kind in sorted(spans, key=lambda span: (span[0], -span[1])):
            if apart and start < apart[-1][1]:  # found both ways: all of it goes
                apart[-1] = (apart[-1][0], max(apart[-1][1], end), apart[-1][2])
            else:
                apart.append((start, end, kind))
        return apart


def _unescaped(text: str) -> tuple[str, Sequence[int]]:
    """`text` with escapes of ASCII characters undone, and where each of its characters, and its end, was."""
    if "%" not in text:
        return text, range(len(text) + 1)
    origins: Sequence[int] = range(len(text) + 1)
    for _ in range(_MOST_ESCAPED):
        signs, kept, position = list[str](), list[int](), 0
        while position < len(text):
            escape = _ESCAPE.match(text, position)
            signs.append(chr(int(escape[1], 16)) if escape else text[position])
            kept.append(origins[position])
            position += 3 if escape else 1
        kept.append(origins[position])
        if len(kept) == len(origins):
            break
        text, origins = "".join(signs), kept
    return text, origins
