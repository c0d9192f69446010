"""File names as text that every table, log and terminal takes, and back.

A Linux file name is bytes, without "/" and NUL: it need not be UTF-8, and may hold line ends and terminal controls.
What cannot be shown is written with a backslash: \\xff for a byte that is no UTF-8 or is a control character, \\u2028
for a character that breaks or turns lines, \\\\ for a backslash. So no two files get one name, and each is found by it.
"""

import os
import re

_HIDDEN = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_WRITTEN = re.compile(r"\\(?:\\|x([0-9a-f]{2})|u([0-9a-f]{4}))")


def printable(path: str) -> str:
    """`path`, as os functions give it, without anything that cannot be shown."""
    return _HIDDEN.sub(lambda found: _written(found[0]), path)


def openable(name: str) -> str:
    """The path that `printable` made `name` of."""
    return _WRITTEN.sub(_read, name)


def _written(character: str) -> str:
    if character == "\\":
        return r"\\"
    if "\udc80" <= character <= "\udcff":  # stands for a byte: see os.fsdecode
        return f"\\x{ord(character) - 0xDC00:02x}"
    return f"\\x{ord(character):02x}" if character < "\x80" else f"\\u{ord(character):04x}"


def _read(found: re.Match[str]) -> str:
    if found[1]:
        return os.fsdecode(bytes.fromhex(found[1])) if int(found[1], 16) > 0x7F else chr(int(found[1], 16))
    return chr(int(found[2], 16)) if found[2] else "\\"
