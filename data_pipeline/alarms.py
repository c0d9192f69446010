"""Alarms: counts that add up and are still wrong. A stage that takes too much of a source, a filter that takes nothing.

Conservation itself is no alarm but an error, in `ledger`. A canary that its rule did not catch is an alarm as well, and
so is a document of the input that the config expects another fate of. Canaries count in no stage's alarms. What is
known of a stage is its tally, of a document its rows in tables; texts are not read.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.alarms import WATCHED, AlarmsConfig
from configs.canaries import DUPLICATES, KEPT, REPEATS, CanaryConfig
from data_pipeline.canaries.naming import canaries_of, is_canary
from data_pipeline.canaries.plant import FATES, id_of, numbered
from data_pipeline.core.ledger import SourceTally, Tally
from data_pipeline.core.tables import read_table
from data_pipeline.provenance.lookup import TABLE_STAGES, places, rows_of, set_aside
from data_pipeline.reading.ids import published_id


def alarms(tallies: Mapping[str, Tally], run_dir: Path, settings: AlarmsConfig) -> list[str]:
    """A sentence for each, stages in their order, then documents; `tallies` are those of all stages, by name."""
    found = []
    for stage, tally in tallies.items():
        if stage in WATCHED:
            found += _too_much(stage, tally, settings.drop_limit(stage))
            if settings.must_drop(stage):
                found += _nothing(stage, tally.total(), settings.min_documents)
    return found + _other_fates(run_dir, settings.expected, tallies)


def _too_much(stage: str, tally: Tally, limit: float) -> list[str]:
    """By source: in the sum of all, a small one that is lost does not show."""
    found = []
    for source, counts in sorted(tally.sources.items()):
        if is_canary(source):
            continue
        for unit in ("documents", "bytes"):
            came_in = getattr(counts.came_in, unit)
            lost = sum(getattr(amount, unit) for amount in counts.dropped.values())
            if lost > limit * came_in:
                reasons = counts.dropped.items()
                reason, _ = max(reasons, key=lambda item: (getattr(item[1], unit), item[0]))
                found.append(
                    f"{stage} dropped {lost:,} of {came_in:,} {unit} of {source} ({lost / came_in:.1%}), over the "
                    f"limit of {limit:.0%}, most for {reason}; look at it by `trivium data sample CONFIG --stage "
                    f"{stage}`, or set alarms.stages.{stage}.max_drop_share = {math.ceil(1000 * lost / came_in) / 1000}"
                )
                break
    return found


def _nothing(stage: str, total: SourceTally, least: int) -> list[str]:
    if total.came_in.documents < least or any(amount.bytes for amount in total.dropped.values()):
        return []
    return [
        f"{stage} dropped nothing of {total.came_in.documents:,} documents: are its settings what you meant? If so, "
        f"set alarms.stages.{stage}.must_drop = false"
    ]


def _other_fates(run_dir: Path, expected: Mapping[str, str], done: Collection[str]) -> list[str]:
    if not expected:
        return []
    expected = {published_id(name): fate for name, fate in expected.items()}
    said: dict[str, set[str]] = {name: set() for name in expected}
    for record in set_aside(run_dir, said.keys()):
        said[record["id"]].add(record.get("reason") or record.get("verdict") or "")
    stages = [name for name in TABLE_STAGES if name in done]
    for place in places(run_dir, said.keys()):
        rows = (rows_of(run_dir, stage, place) for stage in stages)
        verdicts = [row["verdict"] for row in rows if row is not None and row["verdict"]]
        said[place.id].add(verdicts[0] if verdicts else KEPT)
    found = []
    for name, fate in expected.items():
        if said[name] == {fate}:
            continue
        what = " and ".join(KEPT if reason == KEPT else f"dropped for {reason}" for reason in sorted(said[name]))
        should = KEPT if fate == KEPT else f"dropped for {fate}"
        found.append(f"document {name!r} should be {should}, and was {what or 'not found in the input'}")
    return found


@dataclass(frozen=True)
class Seen:
    """What became of one text: the first reason for which it was dropped, "" for none; all for which it was cut."""

    id: str
    reason: str
    cuts: frozenset[str]

    def caught_by(self, reason: str) -> bool:
        return self.reason == reason or (not self.reason and reason in self.cuts)

    def __str__(self) -> str:
        if self.reason:
            return f"dropped for {self.reason}"
        return f"cut for {' and '.join(sorted(self.cuts))}" if self.cuts else KEPT


def look(run_dir: Path, canaries: Mapping[str, CanaryConfig], done: Collection[str]) -> list[dict[str, Any]]:
    """For each canary its name, source and expected reason, what became of its texts, and whether that is right.

    `done` are the run's stages; folders of others may be left from a run with another config. Nothing is said before
    documents is done, where canaries end.
    """
    if "documents" not in done:
        return []
    stages = [name for name in TABLE_STAGES if name in done]
    found = []
    for name, (number, canary) in numbered(canaries).items():
        seen = _seen(run_dir, stages, f"{canaries_of(canary.source)}/{number:04d}")
        texts = [seen[id_of(name, place)] for place in range(len(canary.texts))]
        entry = {"name": name, "source": canary.source, "reason": canary.reason}
        found.append(entry | {"texts": {one.id: str(one) for one in texts}, "caught": _right(canary.reason, texts)})
    return found


def missed(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each canary of `look` that was not caught as it should have been."""
    return [
        f"canary {one['name']!r} of {one['source']} should be {_expected(one['reason'], len(one['texts']))}; "
        + ", ".join(f"{text} was {fate}" for text, fate in one["texts"].items())
        for one in found
        if not one["caught"]
    ]


def _right(reason: str, texts: list[Seen]) -> bool:
    if reason == KEPT:
        return all(not one.reason and not one.cuts for one in texts)
    caught = sum(one.caught_by(reason) for one in texts)
    if reason in DUPLICATES:
        return caught == len(texts) - 1 and sum(not one.reason for one in texts) == 1
    return caught >= 1 if reason in REPEATS else caught == len(texts)


def _expected(reason: str, texts: int) -> str:
    if reason == KEPT:
        return "kept whole"
    if reason in DUPLICATES:
        return f"dropped for {reason}, all but one of {texts}"
    return f"cut for {reason}" if reason in REPEATS else f"caught by {reason}"


def _seen(run_dir: Path, stages: Sequence[str], shard: str) -> dict[str, Seen]:
    """By id, all texts of the canary whose shards begin with `shard`."""
    fates: dict[str, Seen] = {}
    name = shard.replace("/", "-")
    for path in sorted([*run_dir.glob(f"extract/rejected/{name}.jsonl"), *run_dir.glob(f"extract/drops/{name}.jsonl")]):
        with path.open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                fates[record["id"]] = Seen(record["id"], record["reason"], frozenset())
    for stage in stages:
        for table in sorted(run_dir.glob(f"{stage}/{shard}-*.parquet")):
            for row in read_table(table.parent, table.stem).select(["id", "verdict"]).to_pylist():
                before = fates.get(row["id"])
                if before is None or not before.reason:
                    fates[row["id"]] = Seen(row["id"], row["verdict"], frozenset())
    path = run_dir / "documents" / FATES
    if path.is_file():
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if record["id"] in fates:
                fates[record["id"]] = Seen(record["id"], record["reason"], frozenset(record["cuts"]))
    return fates
