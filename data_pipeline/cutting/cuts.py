"""Cuts: parts of texts that stages remove or replace, kept as tables of byte spans while the texts stay unchanged.

Such a stage publishes `cuts/<source>/<shard>.parquet` beside its table of verdicts. The columns are the row in the
extract stage's shard, start and end in UTF-8 bytes of the text as the extract stage published it (always between
characters), a replacement (mostly empty) and a reason. The documents stage merges the cuts of all stages and applies
them once, so that no stage depends on another's offsets.

Where cuts overlap, all their bytes are removed. Each byte is counted under the cut that begins first; among cuts that
begin together, under the one whose stage comes first. If removals (cuts without replacement) cover a whole cut, its
replacement is not inserted. Where other replacements overlap, only one is inserted: the first by start, then the
longest, then the first by stage. Cuts that merely touch are not joined.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datatrove.data import Document

from data_pipeline.core.checked_parquet import read_parquet
from data_pipeline.core.ledger import Tally
from data_pipeline.core.tables import TableStep, read_table, shards_of, write_table

FOLDER = "cuts"
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("replacement", pa.string()),
        ("reason", pa.string()),
    ]
)


class Cut(NamedTuple):
    """Bytes [start, end) of a text, at least one, and the text that replaces them, which may be empty."""

    start: int
    end: int
    replacement: str
    reason: str


@dataclass(frozen=True)
class MergedCuts:
    """All cuts of one document, merged into disjoint spans (start, end, replacement), in bytes and in order."""

    spans: list[tuple[int, int, str]]
    removed: dict[str, int]  # bytes by reason; their sum is the bytes in spans

    @property
    def removed_bytes(self) -> int:
        """UTF-8 bytes that the cuts remove."""
        return sum(self.removed.values())

    @property
    def inserted_bytes(self) -> int:
        """UTF-8 bytes of the replacements that are inserted."""
        return sum(len(replacement.encode()) for _, _, replacement in self.spans)


def merge(cuts: Sequence[Cut]) -> MergedCuts:
    """Merges a document's cuts, given in the order of their stages, by the rules in this module's docstring."""
    removals = union([(cut.start, cut.end) for cut in cuts if not cut.replacement])
    ordered = sorted(cuts, key=lambda cut: cut.start)  # stable: ties stay in the stages' order
    removed: dict[str, int] = {}
    spans: list[tuple[int, int, str]] = []
    standing: list[Cut] = []  # cuts of the current span whose replacements no removal covers
    removal = 0
    for cut in ordered:
        if not spans or cut.start >= spans[-1][1]:
            spans.append((cut.start, cut.start, ""))
            standing = []
        start, end, replacement = spans[-1]
        if cut.end > end:
            removed[cut.reason] = removed.get(cut.reason, 0) + cut.end - max(end, cut.start)
        if cut.replacement:
            while removal < len(removals) and removals[removal][1] <= cut.start:
                removal += 1
            covered = removal < len(removals) and removals[removal][0] <= cut.start and cut.end <= removals[removal][1]
            if not covered:
                standing.append(cut)
                replacement = min(standing, key=lambda cut: (cut.start, -cut.end)).replacement
        spans[-1] = (start, max(end, cut.end), replacement)
    return MergedCuts(spans, removed)


def union(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins spans that overlap or touch; returns them in order."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def apply(text: str, merged: MergedCuts) -> str:
    """Applies merged cuts to a text. Raises ValueError for a cut outside of the text or inside a character."""
    raw = text.encode()
    parts, position = [], 0
    for start, end, replacement in merged.spans:
        if not (_between_characters(raw, start) and _between_characters(raw, end)):
            raise ValueError(f"a cut of bytes {start} to {end} does not lie between characters of {len(raw)} bytes")
        parts += [raw[position:start], replacement.encode()]
        position = end
    return b"".join([*parts, raw[position:]]).decode()


def _between_characters(raw: bytes, offset: int) -> bool:
    return 0 <= offset <= len(raw) and (offset == len(raw) or raw[offset] & 0xC0 != 0x80)


def byte_offsets(text: str, positions: Sequence[int]) -> list[int]:
    """Converts offsets in characters, in any order, to offsets in UTF-8 bytes."""
    if text.isascii():
        return list(positions)
    offsets: dict[int, int] = {}
    done = size = 0
    for position in sorted(set(positions)):
        size += len(text[done:position].encode())
        offsets[position] = size
        done = position
    return [offsets[position] for position in positions]


def write_cuts(folder: str | Path, shard: str, cuts: Sequence[tuple[int, Cut]]) -> None:
    """Writes a shard's table of cuts from (row, cut) pairs; without any, an empty table."""
    columns = [[row for row, _ in cuts], *([cut[field] for _, cut in cuts] for field in range(4))]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    write_table(Path(folder) / FOLDER, shard, pa.table(arrays, schema=SCHEMA))


def read_cuts(stages: Sequence[str | Path], shard: str) -> dict[int, list[Cut]]:
    """Reads the cuts of a shard from several stages: row -> cuts, in the order of stages; some may lack the shard."""
    found: dict[int, list[Cut]] = {}
    for stage in stages:
        path = Path(stage) / FOLDER / f"{shard}.parquet"
        if not path.is_file():
            continue
        for line in read_parquet(path).to_pylist():
            found.setdefault(line.pop("row"), []).append(Cut(**line))
    return found


def note_cuts(folder: str | Path, tally: Tally) -> None:
    """Adds to the tally's notes, by source and reason, how many cuts a stage made and in how many documents."""
    for shard in shards_of(Path(folder) / FOLDER):
        table = read_table(Path(folder) / FOLDER, shard, ["row", "reason"])
        groups = table.group_by("reason").aggregate([("row", "count"), ("row", "count_distinct")])
        for group in groups.to_pylist():
            source = shard.split("/")[0]
            tally.note(source, f"{group['reason']} in documents", group["row_count_distinct"])
            tally.note(source, f"{group['reason']} cuts", group["row_count"])


class CutStep(TableStep):
    """Base class of steps that find cuts in the documents that the stage `select` kept.

    Writes a table of verdicts and a table of cuts per shard.
    """

    type = "✂️ - CUTS"

    def __init__(self, folder: str, tallies: str, select: str) -> None:
        super().__init__(folder, tallies, select=select)
        self._cuts: list[tuple[int, Cut]] = []

    @abstractmethod
    def find(self, document: Document) -> tuple[list[Cut], dict[str, Any]]:
        """Returns the cuts of one document and columns for its row of the table; a `verdict` among them drops it."""

    def measure(self, document: Document, before: dict[str, Any]) -> dict[str, Any]:
        cuts, columns = self.find(document)
        self._cuts.extend((document.metadata["row"], cut) for cut in cuts)
        return {"cuts": len(cuts), "cut_bytes": merge(cuts).removed_bytes, **columns}

    def write(self, shard: str, rows: Sequence[dict[str, Any]]) -> None:
        super().write(shard, rows)
        write_cuts(self.folder, shard, self._cuts)
        self._cuts = []
