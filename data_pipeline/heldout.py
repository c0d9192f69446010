"""The held-out split, and the documents that go on to the tokenizer: `<split>/<source>/NNNNN.jsonl.gz`.

A document is held out by the hash of (seed, its id), so that the split survives a change of filters, of order
and of the number of workers. Near-duplicates cannot sit on both sides: deduplication ran before, over all
sources.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.hashing import stable_hash
from data_pipeline.ledger import Tally
from data_pipeline.tables import kept_rows, read_table

TRAIN, HELDOUT = "train", "heldout"
# Scores that travel with a document into the token store's table; all others stay in the score stage's
# tables.
SCORES = ("quality", "word_count", "alpha_word_ratio", "dup_line_char_ratio", "top_2_gram", "dup_5_gram")


def draw(seed: int, document_id: str) -> float:
    """In [0, 1), a function of seed and id."""
    return stable_hash(f"{seed}\0{document_id}") / 2**64


def heldout_ids(ids: Sequence[str], share: float, seed: int, source: str) -> set[str]:
    """The ids to hold out of one source: those drawn under `share`, or the lowest one when none is."""
    if len(set(ids)) < 2:
        raise ValueError(
            f"source {source} has {len(set(ids))} documents left, and a held-out split needs 2; "
            "loosen its rules (see the drops), or give it more files"
        )
    draws = {document_id: draw(seed, document_id) for document_id in ids}
    chosen = {document_id for document_id, value in draws.items() if value < share}
    chosen = chosen or {min(draws, key=lambda document_id: (draws[document_id], document_id))}
    if len(chosen) == len(draws):
        chosen.remove(max(draws, key=lambda document_id: (draws[document_id], document_id)))
    return chosen


class Split(PipelineStep):
    """Passes on what deduplication kept, each document with its split, its scores and its output shard."""

    name = "Held-out split"
    type = "🔀 - SPLIT"

    def __init__(
        self,
        deduped: str,
        scores: str,
        languages: str,
        heldout: dict[str, set[str]],
        tallies: str,
        order: dict[str, int],
    ) -> None:
        super().__init__()
        self.deduped = deduped
        self.scores = scores
        self.languages = languages
        self.heldout = heldout
        self.tallies = tallies
        self.order = order
        self._rows: tuple[str, dict[int, dict[str, Any]]] = ("", {})

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tally = Tally()
        for document in data:
            metadata = document.metadata
            source, shard = metadata["source"], metadata["shard"]
            row = self._row(shard, metadata["row"])
            if row is None:
                continue
            tally.came_in(source, row["bytes"])
            split = HELDOUT if document.id in self.heldout[source] else TRAIN
            metadata |= row | {"split": split, "output": f"{self.order[shard]:05d}"}
            tally.kept(source, metadata["bytes"])
            if split == HELDOUT:
                tally.note(source, "held out")
            yield document
        tally.save(Path(self.tallies) / f"out-{rank:05d}.json")

    def _row(self, shard: str, row: int) -> dict[str, Any] | None:
        if self._rows[0] != shard:
            deduped = kept_rows(read_table(self.deduped, shard))
            scores = {line["row"]: line for line in _columns(read_table(self.scores, shard), ("row", *SCORES))}
            spoken = {
                line["row"]: line
                for line in _columns(read_table(self.languages, shard), ("row", "language", "language_score"))
            }
            found = {}
            for line in _columns(deduped, ("row", "bytes", "cluster_size")):
                place = line.pop("row")
                found[place] = line | {
                    "language": spoken[place]["language"],
                    "language_score": round(spoken[place]["language_score"], 6),
                    "scores": {name: round(scores[place][name], 6) for name in SCORES},
                }
            self._rows = (shard, found)
        return self._rows[1].get(row)


def _columns(table: pa.Table, names: Sequence[str]) -> list[dict[str, Any]]:
    return table.select(list(names)).to_pylist()


_INTERNAL = frozenset({"shard", "row", "split", "output"})


def split_record(step: PipelineStep, document: Document) -> dict[str, Any]:
    """What of a document is published."""
    metadata = {key: value for key, value in document.metadata.items() if key not in _INTERNAL}
    return {"text": document.text, "id": document.id, "metadata": metadata}
