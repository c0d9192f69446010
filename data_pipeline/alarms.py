"""Alarms about counts that add up but look wrong: a stage that drops too much of a source, a filter that drops nothing.

A document whose fate differs from `alarms.expected` is an alarm too. Canaries are left out of all counts here; those
that no rule caught are alarms of `canaries.check`. Counts that do not add up are errors (`core.ledger`), not alarms.
Stages are judged by their tallies, documents by their rows in the stages' tables; texts are not read.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from configs.alarms import WATCHED, AlarmsConfig
from configs.canaries import KEPT
from data_pipeline.core.canary_naming import is_canary
from data_pipeline.core.ledger import SourceTally, Tally
from data_pipeline.core.tables import TABLE_STAGES
from data_pipeline.provenance.lookup import locations, rows_of, set_aside
from data_pipeline.reading.ids import published_id


def alarms(tallies: Mapping[str, Tally], run_dir: Path, settings: AlarmsConfig) -> list[str]:
    """Returns a sentence for each alarm: stages in the order of `tallies`, which is by stage name, then documents."""
    found = []
    for stage, tally in tallies.items():
        if stage in WATCHED:
            found += _too_much(stage, tally, settings.drop_limit(stage))
            if settings.must_drop(stage):
                found += _nothing(stage, tally.total(), settings.min_documents)
    return found + _other_fates(run_dir, settings.expected, tallies)


def _too_much(stage: str, tally: Tally, limit: float) -> list[str]:
    """Returns a sentence for each source of which the stage dropped too much; a total would hide a small source."""
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
    """Returns a sentence if the stage dropped no byte of at least `least` documents."""
    if total.came_in.documents < least or any(amount.bytes for amount in total.dropped.values()):
        return []
    return [
        f"{stage} dropped nothing of {total.came_in.documents:,} documents: are its settings what you meant? If so, "
        f"set alarms.stages.{stage}.must_drop = false"
    ]


def _other_fates(run_dir: Path, expected: Mapping[str, str], done: Collection[str]) -> list[str]:
    """Returns a sentence for each document of alarms.expected that met another fate than the config expects."""
    if not expected:
        return []
    expected = {published_id(name): fate for name, fate in expected.items()}
    said: dict[str, set[str]] = {name: set() for name in expected}
    for record in set_aside(run_dir, said.keys()):
        said[record["id"]].add(record.get("reason") or record.get("verdict") or "")
    stages = [name for name in TABLE_STAGES if name in done]
    for location in locations(run_dir, said.keys()):
        rows = (rows_of(run_dir, stage, location) for stage in stages)
        verdicts = [row["verdict"] for row in rows if row is not None and row["verdict"]]
        said[location.id].add(verdicts[0] if verdicts else KEPT)
    found = []
    for name, fate in expected.items():
        if said[name] == {fate}:
            continue
        what = " and ".join(KEPT if reason == KEPT else f"dropped for {reason}" for reason in sorted(said[name]))
        should = KEPT if fate == KEPT else f"dropped for {fate}"
        found.append(f"document {name!r} should be {should}, and was {what or 'not found in the input'}")
    return found
