"""Ids of documents, by which reports, held-out draws and takedowns refer to them.

A record's own id is kept. A record without one gets an id from its location: the source, the file, and the line, row or
byte offset. The file is named by its path below the folder that all patterns of the source share, so that a corpus can
be moved. An id that contains personal data is replaced by its hash everywhere, so that no table or log shows it; anyone
who knows the id can compute the hash. So is one with line ends, which no list of ids could name. `extraction.unique`
makes ids unique once all ids of a run are known.
"""

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from data_pipeline.personal_data.hiding import holds_personal_data
from data_pipeline.reading.names import printable

APART = "#"  # separates an id that several documents share from the location that makes each one's id unique
_LONGEST = 500  # characters; a longer id is hashed as well
_LINE_END = re.compile("[\r\n]")
_LETTERS = str.maketrans("0123456789abcdef", "abcdefghijklmnop")  # digits could be taken for a telephone number


Roots = Mapping[str, str]  # scheme ("" for local files) -> folder to which the names of files are relative


def roots_of(patterns: Sequence[str], paths: Iterable[str]) -> Roots:
    """Returns the folders to which the names of a source's files are relative.

    They depend on the patterns and not on the files found at `paths`, so that adding a file does not rename others.
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
    """Returns a file's path relative to the source's root, with its scheme if the source's files have several."""
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
    """Returns the id of a record without an id of its own; `position` is left out if the file is one document."""
    return published_id(f"{source}/{name}/{position}" if position != "" else f"{source}/{name}")


def published_id(own: str) -> str:
    """Returns the id `own` or, if it has personal data, a line end, or more than 500 characters, its hash.

    The result depends on `own` alone.
    """
    if len(own) <= _LONGEST and not _LINE_END.search(own) and not holds_personal_data(own):
        return own
    digits = hashlib.blake2b(own.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"id-{digits.translate(_LETTERS)}"


def unique_id(shared: str, location: str) -> str:
    """Returns a unique id for one of several documents that share an id: SHARED#LOCATION."""
    return f"{shared}{APART}{location}"
