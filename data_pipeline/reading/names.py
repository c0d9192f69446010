"""Conversion of file names to text that is safe in every table, log and terminal, and back.

A Linux file name is any bytes but "/" and NUL: it need not be UTF-8, and may contain line ends and terminal controls.
What cannot be shown is escaped with a backslash: \\xff for a byte that is not UTF-8 or is a control character, \\u2028
for a character that breaks a line or changes its direction, \\\\ for a backslash. So every file has a name of its own,
from which its path can be restored.
"""

import os
import re

_HIDDEN = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_WRITTEN = re.compile(r"\\(?:\\|x([0-9a-f]{2})|u([0-9a-f]{4}))")


def printable(path: str) -> str:
    """Escapes all characters of `path`, given as os functions return it, that cannot be shown."""
    return _HIDDEN.sub(lambda found: _written(found[0]), path)


def openable(name: str) -> str:
    """Restores the path from a name that `printable` returned."""
    return _WRITTEN.sub(_read, name)


def _written(character: str) -> str:
    if character == "\\":
        return r"\\"
    if "\udc80" <= character <= "\udcff":  # a byte that is not UTF-8, as os.fsdecode returns it
        return f"\\x{ord(character) - 0xDC00:02x}"
    return f"\\x{ord(character):02x}" if character < "\x80" else f"\\u{ord(character):04x}"


def _read(found: re.Match[str]) -> str:
    if found[1]:
        return os.fsdecode(bytes.fromhex(found[1])) if int(found[1], 16) > 0x7F else chr(int(found[1], 16))
    return chr(int(found[2], 16)) if found[2] else "\\"
