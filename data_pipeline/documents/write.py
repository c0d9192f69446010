"""Writes the documents that the tokenizer gets, `<split>/<source>/NNNNN.jsonl.zst`, after all cuts are applied.

The cuts of all stages are applied to a text at once. A document is dropped as `mostly_cut` if it loses more than
`documents.cut_share_max` of its bytes and has fewer than `documents.left_bytes_min` left, or if only white space is
left. A first pass (`Survey`) reads only the stages' tables and finds what each source has in all; the second reads the
texts.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from configs.cuts import Kind, PiiConfig
from data_pipeline.canaries.plant import LEFT_OUT
from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.ledger import Tally
from data_pipeline.core.shards import HELDOUT, TRAIN
from data_pipeline.core.tables import SAMPLES, kept_rows, read_table
from data_pipeline.cutting.cuts import MergedCuts, apply, merge, read_cuts
from data_pipeline.documents.heldout import Extremes, HeldoutRule
from data_pipeline.personal_data.find import PLACEHOLDERS
from data_pipeline.personal_data.hiding import Hiding
from data_pipeline.reading.document_urls import URL_KEY, url_key, url_of

MOSTLY_CUT = "mostly_cut"
FROM_RECORD = ("file", "path", "url", "record", "fields")  # metadata that comes from the input file or record
# Scores that are copied into the token store's table; the others are only in the score stage's tables.
SCORES = ("quality", "word_count", "alpha_word_ratio", "dup_line_char_ratio", "top_2_gram", "dup_5_gram")


@dataclass(frozen=True)
class StageFolders:
    """Folders of the earlier stages whose tables decide about documents, and the limits for cut documents.

    `judges` and `cutters` are in the order in which the stages run.
    """

    kept: str  # the last stage that sees all documents; those that it kept come in
    judges: tuple[str, ...]  # stages after it, which all read its output; a document must pass all of them
    cutters: tuple[str, ...]  # stages with tables of cuts
    deduped: str
    scores: str
    languages: str
    cut_share_max: float
    left_bytes_min: int


@dataclass(frozen=True)
class DocumentFate:
    """Fate of a document: dropped for `reason`, or passed on after its cuts if that is empty."""

    row: int
    id: str
    size: int  # bytes of its text before the cuts
    reason: str
    merged: MergedCuts


def fates(before: StageFolders, shard: str) -> list[DocumentFate]:
    """Returns the fate of each document of a shard that comes in, read from tables alone."""
    coming = kept_rows(read_table(before.kept, shard, ("row", "id", "bytes", "verdict")))
    if not coming.num_rows:  # then later stages have no table for this shard
        return []
    cuts = read_cuts(before.cutters, shard)
    verdicts: dict[int, str] = {}
    for judge in reversed(before.judges):
        verdicts |= {line["row"]: line["verdict"] for line in read_table(judge, shard).to_pylist() if line["verdict"]}
    found = []
    for line in coming.to_pylist():
        merged = merge(cuts.get(line["row"], []))
        reason = verdicts.get(line["row"], "")
        left = line["bytes"] - merged.removed_bytes + merged.inserted_bytes
        short = left < before.left_bytes_min
        if not reason and short and merged.removed_bytes > before.cut_share_max * line["bytes"]:
            reason = MOSTLY_CUT
        found.append(DocumentFate(line["row"], line["id"], line["bytes"], reason, merged))
    return found


class Survey(PipelineStep):
    """Writes one ShardSurvey, as a JSON line, for each shard with incoming documents; reads tables alone."""

    name = "Survey"
    type = "🔭 - SURVEY"

    def __init__(self, before: StageFolders, shards: Sequence[str], seed: int, out: str) -> None:
        super().__init__()
        self.before = before
        self.shards = list(shards)
        self.seed = seed
        self.out = out

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        lines = []
        for shard in self.shards[rank::world_size]:
            if coming := fates(self.before, shard):
                lines.append(json.dumps(dataclasses.asdict(self._survey_of(shard, coming))) + "\n")
        path = Path(self.out) / f"{rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
        yield from ()

    def _survey_of(self, shard: str, coming: Sequence[DocumentFate]) -> "ShardSurvey":
        """Sums up one shard for the second pass, from the fates of its documents."""
        source = shard.split("/")[0]
        if is_canary(shard):
            fates_of = [{"id": fate.id, "reason": fate.reason, "cuts": fate.merged.removed} for fate in coming]
            return ShardSurvey(shard, Extremes(), [], fates_of)
        mostly_cut = [
            {"source": source, "shard": shard, "row": fate.row, "id": fate.id, "bytes": fate.size}
            | {"verdict": MOSTLY_CUT, "cut_bytes": fate.merged.removed}
            for fate in coming
            if fate.reason == MOSTLY_CUT
        ]
        left = Extremes.of((fate.id for fate in coming if not fate.reason), self.seed)
        return ShardSurvey(shard, left, mostly_cut[:SAMPLES], [])


@dataclass(frozen=True)
class ShardSurvey:
    """Facts about one shard from the first pass: extremes of ids, samples of mostly cut texts, fates of canaries."""

    shard: str
    left: Extremes
    mostly_cut: list[dict[str, Any]]
    canaries: list[dict[str, Any]]


def surveyed(folder: Path) -> list[ShardSurvey]:
    """Reads the lines that all tasks of `Survey` wrote to a folder; returns them sorted by shard."""
    found = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            left = Extremes(**{name: drawn and tuple(drawn) for name, drawn in entry["left"].items()})
            found.append(ShardSurvey(**{**entry, "left": left}))
    return sorted(found, key=lambda seen: seen.shard)


def heldout_rules(
    found: Iterable[ShardSurvey], sources: Iterable[str], share: float, seed: int
) -> dict[str, HeldoutRule]:
    """Returns the rule of each source, made from the surveys of all its shards."""
    ends = dict.fromkeys(sources, Extremes())
    for seen in found:
        source = seen.shard.split("/")[0]
        if source in ends:
            ends[source] |= seen.left
    return {source: HeldoutRule.of(left, share, seed) for source, left in ends.items()}


class WriteSplits(PipelineStep):
    """Drops documents, applies cuts, and adds split, language and scores to the metadata of those that it passes on."""

    name = "Held-out split"
    type = "🔀 - SPLIT"

    def __init__(
        self,
        before: StageFolders,
        heldout_rules: Mapping[str, HeldoutRule],
        tallies: str,
        order: dict[str, int],
        pii: PiiConfig | None,
    ) -> None:
        super().__init__()
        self.before = before
        self.heldout_rules = dict(heldout_rules)
        self.tallies = tallies
        self.order = order
        self.pii = pii

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

    def _pass_on(self, document: Document, fate: DocumentFate, tally: Tally) -> DocumentsPipeline:
        """Counts a document and yields it unless it is dropped, with cuts applied and with its split."""
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
        if self.pii and _hide(metadata, self.pii):
            tally.note(source, "personal data replaced in metadata")
        metadata["bytes"] = len(text.encode())
        if fate.merged.spans:
            metadata["cut_bytes"] = fate.merged.removed
            tally.note(source, "cut")
            for why, size in fate.merged.removed.items():
                tally.dropped(source, why, size, documents=0)
            if inserted := fate.merged.inserted_bytes:
                tally.note(source, "inserted bytes", inserted)
        tally.kept(source, fate.size - fate.merged.removed_bytes, metadata["bytes"])
        split = HELDOUT if self.heldout_rules[source].holds_out(document.id) else TRAIN
        metadata |= {"split": split, "output": f"{self.order[metadata['shard']]:05d}"}
        if split == HELDOUT:
            tally.note(source, "held out")
            tally.note(source, "held-out bytes", metadata["bytes"])
        yield document

    def _columns_of(self, shard: str) -> dict[int, dict[str, Any]]:
        """Returns {row: cluster size, language and scores} for the documents that deduplication kept."""
        scores = {line["row"]: line for line in read_table(self.before.scores, shard, ("row", *SCORES)).to_pylist()}
        languages = {
            line["row"]: line
            for line in read_table(self.before.languages, shard, ("row", "language", "language_score")).to_pylist()
        }
        deduped = kept_rows(read_table(self.before.deduped, shard, ("row", "cluster_size", "verdict")))
        return {
            line["row"]: {
                "cluster_size": line["cluster_size"],
                "language": languages[line["row"]]["language"],
                "language_score": round(languages[line["row"]]["language_score"], 6),
                "scores": {name: round(scores[line["row"]][name], 6) for name in SCORES},
            }
            for line in deduped.to_pylist()
        }


def _hide(metadata: dict[str, Any], pii: PiiConfig) -> bool:
    """Replaces personal data in the metadata that comes from file and record; returns whether there was any.

    If the address changes, the key of the original one is kept, so that a document is still found by that address.
    """
    texts: Mapping[Kind, str] = PLACEHOLDERS | pii.replacements
    given = {name: metadata[name] for name in FROM_RECORD if name in metadata}
    hiding = Hiding(pii.actions, texts, pii.private_ips)
    hidden = {name: hiding.value(value, name) for name, value in given.items()}
    if hidden == given:
        return False
    url = url_of(metadata)
    metadata |= hidden
    if url_of(metadata) != url:
        metadata[URL_KEY] = f"{url_key(url):016x}"
    return True


_INTERNAL = frozenset({"shard", "row", "split", "output"})


def split_record(step: PipelineStep, document: Document) -> dict[str, Any]:
    """Returns the fields of a document that are published: text, id, and metadata without internal keys."""
    metadata = {key: value for key, value in document.metadata.items() if key not in _INTERNAL}
    return {"text": document.text, "id": document.id, "metadata": metadata}
