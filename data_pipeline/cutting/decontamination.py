"""Decontamination: drops documents that hold evaluation text, or cuts that text out of them.

The method is that of GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C): 13 words in a row that an evaluation item
has as well are a match, and by default a cut removes 200 characters on either side too. `ngram_index` describes how
texts are compared. For every document with a match, a table `matches/<source>/<shard>.parquet` names the file and item,
and shows the longest matching part in its context.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datatrove.data import Document

from configs.cuts import DecontaminateConfig
from data_pipeline.core.tables import masked, write_table
from data_pipeline.cutting.cuts import Cut, CutStep, byte_offsets
from data_pipeline.cutting.ngram_index import NgramIndex, NgramMatch

FOLDER = "matches"
CONTAMINATED = "contaminated"
_ITEMS = 10  # items listed per document, those with the most n-grams
_CONTEXT = 80  # characters shown on either side of a match
_SHOWN = 400  # characters shown of a match
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("id", pa.string()),
        ("file", pa.string()),
        ("item", pa.string()),
        ("ngrams", pa.int64()),
        ("share", pa.float64()),  # of the item's n-grams
        ("start", pa.int64()),  # start and end of the longest matching part, in bytes of the document's text
        ("end", pa.int64()),
        ("context", pa.string()),  # the match in guillemets
    ]
)


class Decontaminate(CutStep):
    """Step that drops or cuts documents with evaluation text and writes tables of matches.

    `ngram_index` is the folder where the index was saved.
    """

    name = "Decontaminate"

    def __init__(self, folder: str, tallies: str, select: str, settings: DecontaminateConfig, ngram_index: str) -> None:
        super().__init__(folder, tallies, select)
        self.settings = settings
        self.index_folder = ngram_index
        self._ngram_index: NgramIndex | None = None
        self._matches: list[dict[str, Any]] = []

    def find(self, document: Document) -> tuple[list[Cut], dict[str, Any]]:
        if self._ngram_index is None:  # loaded in the worker, since it is too large to be sent
            self._ngram_index = NgramIndex.load(self.index_folder)
        found = self._ngram_index.matches(document.text, self.settings.min_share)
        columns: dict[str, Any] = {"items": len(found)}
        if not found:
            return [], columns
        self._note(document, found[:_ITEMS])
        if self.settings.action == "drop":
            return [], columns | {"verdict": CONTAMINATED}
        margin, size = self.settings.margin, len(document.text)
        spans = sorted({span for match in found for span in match.spans})
        positions = [position for start, end in spans for position in (max(0, start - margin), min(size, end + margin))]
        offsets = byte_offsets(document.text, positions)
        return [
            Cut(start, end, "", CONTAMINATED) for start, end in zip(offsets[::2], offsets[1::2], strict=True)
        ], columns

    def _note(self, document: Document, found: list[NgramMatch]) -> None:
        assert self._ngram_index is not None
        for match in found:
            start, end = max(match.spans, key=lambda span: (span[1] - span[0], -span[0]))
            low, high = byte_offsets(document.text, [start, end])
            file, item = self._ngram_index.names[match.item]
            row = {
                "row": document.metadata["row"],
                "id": document.id,
                "file": file,
                "item": item,
                "ngrams": match.ngrams,
                "share": match.share,
                "start": low,
                "end": high,
                "context": shown(document.text, start, end),
            }
            self._matches.append(masked(row))

    def write(self, shard: str, rows: Sequence[dict[str, Any]]) -> None:
        super().write(shard, rows)
        write_table(Path(self.folder) / FOLDER, shard, pa.Table.from_pylist(self._matches, schema=SCHEMA))
        self._matches = []


def shown(text: str, start: int, end: int) -> str:
    """Shows a match in guillemets with 80 characters on either side; the middle of a long match is left out."""
    match = text[start:end]
    if len(match) > _SHOWN:
        match = f"{match[: _SHOWN // 2]} […] {match[-_SHOWN // 2 :]}"
    return f"{text[max(0, start - _CONTEXT) : start]}«{match}»{text[end : end + _CONTEXT]}"
