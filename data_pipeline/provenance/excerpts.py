"""Texts of a finished run, by shard and row, and pieces of them that people can be shown: masked, always.

A piece is masked by what is found in its surroundings, so that an address that the piece's own ends cut through is
masked as well. Where to look for documents is in `provenance.lookup`.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.core.shards import read_records, shard_path
from data_pipeline.personal_data.find import PLACEHOLDERS, find

_AROUND = 2000  # characters beside a piece that are looked at to mask it; longer than any address or key
_PERSONAL = "pii_"  # how reasons of the PII stage begin


def texts(run_dir: Path, shard: str, rows: Collection[int] | None = None) -> Iterator[tuple[int, str]]:
    """(row, text) of a shard as extract published it; of `rows` only, if given."""
    for row, record in enumerate(read_records(shard_path(run_dir / "extract", shard))):
        if rows is None or row in rows:
            yield row, record["text"]


def piece(text: str, start: int, end: int) -> str:
    """Characters [start, end) of `text`, masked."""
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
    """What a cut took out, with what is around it. All of it masked."""

    before: str
    gone: str  # empty for personal data that something stands for
    stands: str  # in its place; empty for nothing
    after: str

    def __str__(self) -> str:
        return f"{self.before}[[{' -> '.join(filter(None, (self.gone, self.stands)))}]]{self.after}"


def excerpt(text: str, cut: Mapping[str, Any], context: int = 80, longest: int = 300) -> Excerpt:
    """Of a row of a table of cuts; a long cut without its middle. `text` is the one that the cut's bytes are of."""
    raw = text.encode()
    start = len(raw[: cut["start"]].decode())
    end = start + len(raw[cut["start"] : cut["end"]].decode())
    stands = cut["replacement"]
    if cut["reason"].startswith(_PERSONAL):
        # Never by what `find` says of it: the stage may have been asked for other kinds.
        gone = "" if stands else PLACEHOLDERS[cut["reason"].removeprefix(_PERSONAL)]
    elif end - start > longest:
        gone = f"{piece(text, start, start + longest // 2)} […] {piece(text, end - longest // 2, end)}"
    else:
        gone = piece(text, start, end)
    before, after = piece(text, start - context, start), piece(text, end, end + context)
    return Excerpt(before, gone, stands, after)
