"""Replaces personal data in URLs, ids, file names and metadata, which are short and differ from running text.

A URL is also searched with its escapes (`%40`, `%2540`) decoded and its parts separated, so that what follows a "=" or
"/" is found as it would be in a text. In an object, every field name is searched, and every string and whole number
together with the name of its field (`{"phone": 4155550123}`). The kinds that are found are the same as in texts: see
`find`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.cuts import KINDS, Kind
from data_pipeline.personal_data.find import PLACEHOLDERS, WIDE, find

_ESCAPE = re.compile(r"%([0-7][0-9A-Fa-f])")
_APART = str.maketrans("/=&?;|,\\", "\n" * 8)  # no kind of personal data contains a line end
# The ending of a file name: jane@uni.org.txt is an address and an ending.
_ENDING = re.compile(
    r"\.(?=(?:txt|jsonl?|html?|xml|pdf|zip|gz|zst|parquet|warc|eml|mbox|csv|png|jpe?g|gif|svg|webp)(?:[\n.]|\Z))", re.I
)
# Names of fields with telephone numbers, such as contact_phone_2, homePhone and phones, are split into plain words.
_OF_NUMBERS = re.compile(r"(?i)tel|phone|mobile|fax|whatsapp")
_BETWEEN_WORDS = re.compile(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])")
_PLURAL = re.compile(r"(phone|mobile|number)s\b", re.I)
_EXACT = 2.0**53  # a float can hold every integer below it
_MOST_ESCAPED = 3  # how often a character may be escaped, as in a URL within a URL
# Every find contains one of these, so that most short strings are dismissed quickly.
_POSSIBLE = re.compile(
    r"@|&#(?:0?64|x40);|&commat;|\\u0040|[(\[{<] ?(?:[aA]t|AT) ?[)\]}>]| AT | [-_]at[-_] "
    r"|[\"']|PRIVATE KEY|[0-9](?:[^0-9A-Za-z/\n]{0,3}[0-9]){6}|\+[0-9]|[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]"
    r"|[0-9A-Fa-f]:[0-9A-Fa-f]{0,4}:|A[KS]IA|gh[pousr]_|github_pat|glpat-|xox|hooks\.slack|AIza|[rs]k_live|sk-|hf_|npm_"
    r"|pypi-|SG\.|eyJ"
)


def holds_personal_data(text: str) -> bool:
    """Whether an id, URL or file name holds personal data."""
    return hide(text) != text


def hide(text: str) -> str:
    """Replaces all personal data in a URL or other short string by placeholders."""
    return Hiding().text(text)


@dataclass(frozen=True)
class Hiding:
    """Replaces the given `kinds` of personal data by placeholders, which `texts` gives for each kind."""

    kinds: Collection[Kind] = KINDS
    texts: Mapping[Kind, str] = field(default_factory=lambda: PLACEHOLDERS)
    private_ips: bool = False

    def text(self, text: str, name: str = "") -> str:
        """Replaces personal data in a URL or other short string; `name` is the field that holds it, if any."""
        parts, position = [], 0
        for start, end, kind in self._found(text, name):
            parts += [text[position:start], self.texts[kind]]
            position = end
        return "".join([*parts, text[position:]])

    def value(self, value: Any, name: str = "") -> Any:
        """Replaces personal data in all strings, whole numbers and field names of a JSON value, at any depth.

        Field names that become the same are numbered, as in `<EMAIL> (2)`.
        """
        if isinstance(value, str):
            return self.text(value, name)
        # Tables with missing values hold integers as floats.
        if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
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
        """Finds personal data in the text as it is, and with escapes decoded and its parts on separate lines.

        Returns (start, end, kind) in characters of the given text, in order and without overlaps.
        """
        if _OF_NUMBERS.search(name):
            name = _PLURAL.sub(r"\1", _BETWEEN_WORDS.sub(" ", name)).strip()
        label = f"{name}: " if name else ""
        plain, origins = _unescaped(text)
        parts = _ENDING.sub("\n", plain.translate(_APART))
        spans: list[tuple[int, int, Kind]] = []
        for looked_at, at in ((text, range(len(text) + 1)), *([(parts, origins)] if parts != text else [])):
            if _POSSIBLE.search(looked_at) or (not looked_at.isascii() and WIDE.search(looked_at)):
                for start, end, kind in find(label + looked_at, self.kinds, self.private_ips):
                    if end > len(label):
                        spans.append((at[max(start - len(label), 0)], at[end - len(label)], kind))
        apart: list[tuple[int, int, Kind]] = []
        for start, end, kind in sorted(spans, key=lambda span: (span[0], -span[1])):
            if apart and start < apart[-1][1]:  # overlapping finds are joined
                apart[-1] = (apart[-1][0], max(apart[-1][1], end), apart[-1][2])
            else:
                apart.append((start, end, kind))
        return apart


def _unescaped(text: str) -> tuple[str, Sequence[int]]:
    """Decodes escapes of ASCII characters; returns the result and, for each character and the end, its old position."""
    if "%" not in text:
        return text, range(len(text) + 1)
    origins: Sequence[int] = range(len(text) + 1)
    for _ in range(_MOST_ESCAPED):
        characters, kept, position = list[str](), list[int](), 0
        while position < len(text):
            escape = _ESCAPE.match(text, position)
            characters.append(chr(int(escape[1], 16)) if escape else text[position])
            kept.append(origins[position])
            position += 3 if escape else 1
        kept.append(origins[position])
        if len(kept) == len(origins):
            break
        text, origins = "".join(characters), kept
    return text, origins
