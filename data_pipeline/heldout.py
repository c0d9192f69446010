"""The held-out split, and the documents that go on to the tokenizer: `<split>/<source>/NNNNN.jsonl.gz`.

A document is held out by the hash of (seed, its id), so that the split survives a change of filters, of order
and of the number of workers. Near-duplicates cannot sit on both sides: deduplication ran before, over all
sources. What stages cut out of a text is taken out here, all at once; a document that loses more than a share
goes as `mostly_cut`, and so does one of which only white space is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipeline.canaries import LEFT_OUT
from data_pipeline.cuts import Merged, apply, merge, read_cuts
from data_pipeline.hashing import stable_hash
from data_pipeline.ledger import Tally
from data_pipeline.realms import is_canary
from data_pipeline.tables import kept_rows, read_table

TRAIN, HELDOUT = "train", "heldout"
MOSTLY_CUT = "mostly_cut"
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


@dataclass(frozen=True)
class Before:
    """The folders of the stages before: who says what of a document. `judges` and `cutters` are in the order in
    which the stages run.
    """

    kept: str  # the last stage that all documents went through; what it kept comes in
    judges: tuple[str, ...]  # stages beside each other after that one, whose verdicts all count
    cutters: tuple[str, ...]  # stages that cut
    deduped: str
    scores: str
    languages: str
    cut_share_max: float


@dataclass(frozen=True)
class Fate:
    """What becomes of a document: dropped for `reason`, or passed on after its cuts."""

    row: int
    id: str
    size: int  # bytes of its text before the cuts
    reason: str
    merged: Merged


def fates(before: Before, shard: str) -> list[Fate]:
    """Of every document of a shard that comes in, from tables alone."""
    coming = kept_rows(read_table(before.kept, shard))
    if not coming.num_rows:  # the stages after that have no tables of it
        return []
    cuts = read_cuts(before.cutters, shard)
    verdicts: dict[int, str] = {}
    for judge in reversed(before.judges):
        verdicts |= {line["row"]: line["verdict"] for line in read_table(judge, shard).to_pylist() if line["verdict"]}
    found = []
    for line in _columns(coming, ("row", "id", "bytes")):
        merged = merge(cuts.get(line["row"], []))
        reason = verdicts.get(line["row"], "")
        if not reason and merged.removed_bytes > before.cut_share_max * line["bytes"]:
            reason = MOSTLY_CUT
        found.append(Fate(line["row"], line["id"], line["bytes"], reason, merged))
    return found


class Split(PipelineStep):
    """Passes on what no stage dropped, without what stages cut, each document with its split and its scores."""

    name = "Held-out split"
    type = "🔀 - SPLIT"

    def __init__(self, before: Before, heldout: dict[str, set[str]], tallies: str, order: dict[str, int]) -> None:
        super().__init__()
        self.before = before
        self.heldout = heldout
        self.tallies = tallies
        self.order = order

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tally = Tally()
        for shard, documents in groupby(data, key=lambda document: document.metadata["shard"]):
            coming = {fate.row: fate for fate in fates(self.before, shard)}
            columns = self._columns_of(shard)
            for document in documents:
                if fate := coming.get(document.metadata["row"]):
                    document.metadata |= columns[fate.row]
                    yield from self._pass_on(document, fate, tally)
        tally.save(Path(self.tallies) / f"out-{rank:05d}.json")

    def _pass_on(self, document: Document, fate: Fate, tally: Tally) -> DocumentsPipeline:
        metadata = document.metadata
        source = metadata["source"]
        tally.came_in(source, fate.size)
        if is_canary(source):
            tally.dropped(source, fate.reason or LEFT_OUT, fate.size)
            return
        text = document.text if fate.reason else apply(document.text, fate.merged)
        reason = fate.reason or ("" if text.strip() else MOSTLY_CUT)
        if reason:
            tally.dropped(source, reason, fate.size)
            return
        document.text = text
        metadata["bytes"] = len(text.encode())
        if fate.merged.spans:
            metadata["cut_bytes"] = fate.merged.removed
            tally.note(source, "cut")
            for why, size in fate.merged.removed.items():
                tally.dropped(source, why, size, documents=0)
            if inserted := fate.merged.inserted_bytes:
                tally.note(source, "inserted bytes", inserted)
        tally.kept(source, fate.size - fate.merged.removed_bytes, metadata["bytes"])
        split = HELDOUT if document.id in self.heldout[source] else TRAIN
        metadata |= {"split": split, "output": f"{self.order[metadata['shard']]:05d}"}
        if split == HELDOUT:
            tally.note(source, "held out")
        yield document

    def _columns_of(self, shard: str) -> dict[int, dict[str, Any]]:
        """Row -> what travels with a document, for those that deduplication kept."""
        scores = {line["row"]: line for line in _columns(read_table(self.before.scores, shard), ("row", *SCORES))}
        spoken = {
            line["row"]: line
            for line in _columns(read_table(self.before.languages, shard), ("row", "language", "language_score"))
        }
        deduped = kept_rows(read_table(self.before.deduped, shard))
        return {
            line["row"]: {
                "cluster_size": line["cluster_size"],
                "language": spoken[line["row"]]["language"],
                "language_score": round(spoken[line["row"]]["language_score"], 6),
                "scores": {name: round(scores[line["row"]][name], 6) for name in SCORES},
            }
            for line in _columns(deduped, ("row", "cluster_size"))
        }


def _columns(table: pa.Table, names: Sequence[str]) -> list[dict[str, Any]]:
    return table.select(list(names)).to_pylist()


_INTERNAL = frozenset({"shard", "row", "split", "output"})


def split_record(step: PipelineStep, document: Document) -> dict[str, Any]:
    """What of a document is published."""
    metadata = {key: value for key, value in document.metadata.items() if key not in _INTERNAL}
    return {"text": document.text, "id": document.id, "metadata": metadata}
