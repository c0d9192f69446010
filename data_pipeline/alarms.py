"""Alarms: counts that add up and are still wrong. A stage that takes too much of a source, a filter that takes nothing.

Conservation itself is no alarm but an error, in `ledger`. Canaries are documents that somebody planted in the input
and that a named rule has to catch; one that got through, or was caught by another rule, is an alarm as well. What is
known of a stage is its tally; texts are not read.
"""

from collections.abc import Mapping
from pathlib import Path

from configs.alarms import WATCHED, AlarmsConfig
from data_pipeline.ledger import SourceTally, Tally
from data_pipeline.provenance.lookup import places, rows_of, set_aside, stages_of


def alarms(tallies: Mapping[str, Tally], run_dir: Path, settings: AlarmsConfig) -> list[str]:
    """A sentence for each, stages in their order and then canaries; `tallies` are those of all stages, by name."""
    found = []
    for stage, tally in tallies.items():
        if stage in WATCHED:
            found += _too_much(stage, tally, settings.drop_limit(stage))
            if settings.must_drop(stage):
                found += _nothing(stage, tally.total(), settings.min_documents)
    return found + _missed_canaries(run_dir, settings.canaries)


def _too_much(stage: str, tally: Tally, limit: float) -> list[str]:
    """By source: in the sum of all, a small one that is lost does not show."""
    found = []
    for source, counts in sorted(tally.sources.items()):
        for unit in ("documents", "bytes"):
            came_in = getattr(counts.came_in, unit)
            lost = sum(getattr(amount, unit) for amount in counts.dropped.values())
            if lost > limit * came_in:
                reasons = counts.dropped.items()
                reason, _ = max(reasons, key=lambda item: (getattr(item[1], unit), item[0]))
                found.append(
                    f"{stage} dropped {lost:,} of {came_in:,} {unit} of {source} ({lost / came_in:.1%}), over the "
                    f"limit of {limit:.0%}, most for {reason}; look at {stage}/drops, or set "
                    f"alarms.stages.{stage}.max_drop_share"
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


def _missed_canaries(run_dir: Path, canaries: Mapping[str, str]) -> list[str]:
    if not canaries:
        return []
    said: dict[str, set[str]] = {name: set() for name in canaries}
    for record in set_aside(run_dir, said.keys()):
        said[record["id"]].add(record.get("reason") or record.get("verdict") or "")
    stages = stages_of(run_dir)
    for place in places(run_dir, said.keys()):
        rows = (rows_of(run_dir, stage, place) for stage in stages)
        verdicts = [row["verdict"] for row in rows if row is not None and row["verdict"]]
        said[place.id].add(verdicts[0] if verdicts else "")
    found = []
    for name, expected in canaries.items():
        if said[name] == {expected}:
            continue
        what = " and ".join(f"dropped for {reason}" if reason else "kept" for reason in sorted(said[name]))
        found.append(f"canary {name!r} should be dropped for {expected}, and was {what or 'not found in the input'}")
    return found
