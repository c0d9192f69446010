"""Cuts: parts of texts that stages remove or replace, as tables of byte spans beside the untouched text.

A stage that takes something out of documents publishes `cuts/<source>/<shard>.parquet` beside its table of
verdicts: the row in the extract shard, start and end in UTF-8 bytes of the text as the extract stage published
it, always between characters, a replacement (mostly empty) and a reason. The documents stage merges the cuts of
all stages and applies them once, so that no stage depends on another's offsets.

Where cuts overlap, all their bytes go. Each byte is counted under the cut that begins first; of cuts that begin
together, under the one whose stage comes first. Removing wins over replacing: the replacement of a cut that
others remove whole is not inserted. Of overlapping replacements that are left, only the first is, by start, then
length, then stage. Cuts that merely touch stay two.
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
    """Bytes [start, end) of a text, not empty, and what stands there instead."""

    start: int
    end: int
    replacement: str
    reason: str


@dataclass(frozen=True)
class MergedCuts:
    """The cuts of one document as disjoint spans (start, end, replacement) in order, in bytes."""

    spans: list[tuple[int, int, str]]
    removed: dict[str, int]  # bytes by reason; their sum is the bytes in spans

    @property
    def removed_bytes(self) -> int:
        return sum(self.removed.values())

    @property
    def inserted_bytes(self) -> int:
        return sum(len(replacement.encode()) for _, _, replacement in self.spans)


def merge(cuts: Sequence[Cut]) -> MergedCuts:
    """One plan of what leaves a text, `cuts` in the order of their stages; the rules are the module's."""
    removals = union([(cut.start, cut.end) for cut in cuts if not cut.replacement])
    ordered = sorted(cuts, key=lambda cut: cut.start)  # stable: ties stay in the stages' order
    removed: dict[str, int] = {}
    spans: list[tuple[int, int, str]] = []
    standing: list[Cut] = []  # replacements in the span at hand that no removal covers
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
    """Overlapping and touching spans joined, in order."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def apply(text: str, merged: MergedCuts) -> str:
    """`text` after its cuts. Errors: ValueError for a cut outside the text or inside a character."""
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
    """Offsets in characters to offsets in UTF-8 bytes; any order."""
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
    """(row, cut) pairs of one shard; a shard without any gets an empty table."""
    columns = [[row for row, _ in cuts], *([cut[field] for _, cut in cuts] for field in range(4))]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    write_table(Path(folder) / FOLDER, shard, pa.table(arrays, schema=SCHEMA))


def read_cuts(stages: Sequence[str | Path], shard: str) -> dict[int, list[Cut]]:
    """Row -> the cuts of all `stages`, in that order. A stage that did not see the shard has none."""
    found: dict[int, list[Cut]] = {}
    for stage in stages:
        path = Path(stage) / FOLDER / f"{shard}.parquet"
        if not path.is_file():
            continue
        for line in read_parquet(path).to_pylist():
            found.setdefault(line.pop("row"), []).append(Cut(**line))
    return found


def note_cuts(folder: str | Path, tally: Tally) -> None:
    """Notes per source how many documents a stage cuts and how often, by reason."""
    for shard in shards_of(Path(folder) / FOLDER):
        table = read_table(Path(folder) / FOLDER, shard, ["row", "reason"])
        groups = table.group_by("reason").aggregate([("row", "count"), ("row", "count_distinct")])
        for group in groups.to_pylist():
            source = shard.split("/")[0]
            tally.note(source, f"{group['reason']} in documents", group["row_count_distinct"])
            tally.note(source, f"{group['reason']} cuts", group["row_count"])


class CutStep(TableStep):
    """Finds cuts in the documents that the stage `select` kept; writes a table of verdicts and one of cuts."""

    type = "✂️ - CUTS"

    def __init__(self, folder: str, tallies: str, select: str) -> None:
        super().__init__(folder, tallies, select=select)
        self._cuts: list[tuple[int, Cut]] = []

    @abstractmethod
    def find(self, document: Document) -> tuple[list[Cut], dict[str, Any]]:
        """The cuts of one document, and columns for its row of the table (`verdict`, to drop it)."""

    def measure(self, document: Document, before: dict[str, Any]) -> dict[str, Any]:
        cuts, columns = self.find(document)
        self._cuts.extend((document.metadata["row"], cut) for cut in cuts)
        return {"cuts": len(cuts), "cut_bytes": merge(cuts).removed_bytes, **columns}

    def write(self, shard: str, rows: Sequence[dict[str, Any]]) -> None:
        super().write(shard, rows)
        write_cuts(self.folder, shard, self._cuts)
        self._cuts = []
