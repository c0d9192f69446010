"""What documents are called, so that a name stands for one document: in reports, held-out draws, takedowns.

A record's own id is kept. One without is named after its place: source, file and line, row or offset; the file by its
path below the folder that all patterns of the source share, so that a corpus can move. An id that holds personal data
goes into no table and no log: it is replaced by its hash, which whoever knows the id can find again. That no two
documents of a run have one id is seen to by `extraction.unique`, when all are known.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from data_pipeline.personal_data.hiding import holds_personal_data
from data_pipeline.reading.names import printable

APART = "#"  # between an id that several documents were given and the location of each
_LONGEST = 500  # characters; a longer id is hashed as well
_LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")  # since digits can look like a telephone number

Roots = Mapping[str, str]  # by scheme ("" for local files), the folder that files are named from


def roots_of(patterns: Sequence[str], paths: Iterable[str]) -> Roots:
    """Where the files of a source, found at `paths`, are named from: a function of the patterns, not of how many files
    there are, so that a new file renames no other.
    """
    found, known = dict[str, list[str]](), set(paths)
    for pattern in patterns:
        scheme, rest = _split(pattern)
        if glob.has_magic(pattern) and pattern not in known:
            rest = os.path.dirname(re.split(r"[*?\[]", rest)[0])
        elif pattern in known or (not scheme and not os.path.isdir(pattern)):
            rest = os.path.dirname(rest)
        found.setdefault(scheme, []).append(rest.strip("/") if scheme else printable(os.path.abspath(rest)))
    shared = {scheme: os.path.commonpath(folders) for scheme, folders in found.items()}
    return shared if len(shared) == 1 else {scheme: "" if scheme else root for scheme, root in shared.items()}


def name_of(path: str, roots: Roots) -> str:
    """The path below the source's root; with its scheme where a source has files of several."""
    scheme, rest = _split(path)
    if not scheme:
        return os.path.relpath(os.path.abspath(path), roots.get("", "/"))
    rest, root = rest.strip("/"), roots.get(scheme, "")
    if root and rest.startswith(f"{root}/"):
        return rest.removeprefix(f"{root}/")
    return rest if len(roots) == 1 else f"{scheme}://{rest}"


def _split(path: str) -> tuple[str, str]:
    scheme, separator, rest = path.partition("://")
    return (scheme, rest) if separator else ("", path)


def id_of_location(source: str, name: str, position: int | str = "") -> str:
    """The id of a record that has none; without a position, that of a file which is one document."""
    return published_id(f"{source}/{name}/{position}" if position != "" else f"{source}/{name}")


def published_id(own: str) -> str:
    """`own` as it is published: its hash where it holds personal data, or is very long. The same everywhere."""
    if len(own) <= _LONGEST and not holds_personal_data(own):
        return own
    digits = hashlib.blake2b(own.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"id-{digits.translate(_LETTERS)}"


def told_apart(shared: str, location: str) -> str:
    """The id of one of several documents that were given the id `shared`."""
    return f"{shared}{APART}{location}"
