"""Reads texts of a finished run, by shard and row, and makes excerpts for display, in which personal data is masked.

Personal data is searched for in an excerpt's surroundings too, so that an address that the excerpt's ends cut through
is masked as well. `provenance.lookup` finds the shard and row of a document.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.core.shards import read_records, shard_path
from data_pipeline.personal_data.find import PLACEHOLDERS, find

_AROUND = 2000  # characters on each side of an excerpt that are searched too; more than any address or key has
_PERSONAL = "pii_"  # prefix of the PII stage's reasons


def texts(run_dir: Path, shard: str, rows: Collection[int] | None = None) -> Iterator[tuple[int, str]]:
    """Yields (row, text) of a shard as the extract stage published it, only of `rows` if given."""
    for row, record in enumerate(read_records(shard_path(run_dir / "extract", shard))):
        if rows is None or row in rows:
            yield row, record["text"]


def piece(text: str, start: int, end: int) -> str:
    """Returns characters [start, end) of `text`, masked."""
    start, end = max(0, start), min(len(text), end)
    low = max(0, start - _AROUND)
    parts, position = [], start
    for found in find(text[low : end + _AROUND], private_ips=True):
        first, last = low + found.start, low + found.end
        if last <= start or first >= end:
            continue
        parts += [text[position : max(first, position)], PLACEHOLDERS[found.kind]]
        position = min(last, end)
    return "".join([*parts, text[position:end]])


class Excerpt(NamedTuple):
    """A cut with the text around it, all of it masked."""

    before: str
    removed: str  # the text that was cut; empty for personal data that was replaced
    replacement: str  # the text that replaces it; empty if none does
    after: str

    def __str__(self) -> str:
        return f"{self.before}[[{' -> '.join(filter(None, (self.removed, self.replacement)))}]]{self.after}"


def excerpt(text: str, cut: Mapping[str, Any], context: int = 80, longest: int = 300) -> Excerpt:
    """Makes the excerpt of a cut, which is a row of a table of cuts; the middle of a long cut is left out.

    `text` is the document's text before all cuts, to which the cut's byte offsets refer.
    """
    raw = text.encode()
    start = len(raw[: cut["start"]].decode())
    end = start + len(raw[cut["start"] : cut["end"]].decode())
    replacement = cut["replacement"]
    if cut["reason"].startswith(_PERSONAL):
        # Masked by the kind in the reason, not by `find`, which may take it for another kind.
        removed = "" if replacement else PLACEHOLDERS[cut["reason"].removeprefix(_PERSONAL)]
    elif end - start > longest:
        removed = f"{piece(text, start, start + longest // 2)} […] {piece(text, end - longest // 2, end)}"
    else:
        removed = piece(text, start, end)
    before, after = piece(text, start - context, start), piece(text, end, end + context)
    return Excerpt(before, removed, replacement, after)
