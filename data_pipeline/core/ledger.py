"""Counts documents and bytes through the stages and checks that none is lost.

A `Tally` holds, per source, how many documents and bytes came in, were kept, and were dropped for each reason. Each
step of a task fills one; the leading process adds them up and checks that what came in equals what was kept plus what
was dropped. `report.ledger_tables` prints the ledger.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.core.canary_naming import is_canary


class LedgerError(RuntimeError):
    """Raised if counts of documents or bytes do not add up; a defect of the pipeline, never of the data."""


@dataclass
class Amount:
    """A number of documents and the bytes of their texts."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, size: int) -> None:
        self.documents += documents
        self.bytes += size

    def plain(self) -> dict[str, int]:
        """Returns the counts of documents and bytes as a dict for JSON."""
        return {"documents": self.documents, "bytes": self.bytes}


@dataclass
class SourceTally:
    """Counts of one source in one stage.

    `came_in`, `kept` and `dropped` count the texts as they came in; `passed_on` counts the kept documents as the next
    stage will read them. Its bytes differ from those of `kept` where the stage rewrites texts.
    """

    came_in: Amount = field(default_factory=Amount)
    kept: Amount = field(default_factory=Amount)
    passed_on: Amount = field(default_factory=Amount)
    dropped: dict[str, Amount] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)  # other counts of the stage by name, such as "held out"

    def merge(self, theirs: "SourceTally") -> None:
        """Adds another tally's counts to this one."""
        self.came_in.add(theirs.came_in.documents, theirs.came_in.bytes)
        self.kept.add(theirs.kept.documents, theirs.kept.bytes)
        self.passed_on.add(theirs.passed_on.documents, theirs.passed_on.bytes)
        for reason, amount in theirs.dropped.items():
            self.dropped.setdefault(reason, Amount()).add(amount.documents, amount.bytes)
        for name, count in theirs.notes.items():
            self.notes[name] = self.notes.get(name, 0) + count

    def plain(self) -> dict[str, Any]:
        return {
            "in": self.came_in.plain(),
            "kept": self.kept.plain(),
            "passed_on": self.passed_on.plain(),
            "dropped": {reason: amount.plain() for reason, amount in sorted(self.dropped.items())},
            "notes": dict(sorted(self.notes.items())),
        }


class Tally:
    """Counts of one stage, by source."""

    def __init__(self) -> None:
        self.sources: dict[str, SourceTally] = {}

    def of(self, source: str) -> SourceTally:
        """Returns the counts of a source, which start at 0."""
        return self.sources.setdefault(source, SourceTally())

    def came_in(self, source: str, size: int, documents: int = 1) -> None:
        """Counts documents, of `size` bytes in all, as input."""
        self.of(source).came_in.add(documents, size)

    def kept(self, source: str, size: int, passed_on: int | None = None, documents: int = 1) -> None:
        """Counts documents as kept; `passed_on` is their size in bytes after the stage, if it rewrites texts."""
        self.of(source).kept.add(documents, size)
        self.of(source).passed_on.add(documents, size if passed_on is None else passed_on)

    def dropped(self, source: str, reason: str, size: int, documents: int = 1) -> None:
        """Counts documents as dropped for a reason."""
        self.of(source).dropped.setdefault(reason, Amount()).add(documents, size)

    def note(self, source: str, name: str, documents: int = 1) -> None:
        """Adds to a further count of a source, such as "held out", by the count's name."""
        notes = self.of(source).notes
        notes[name] = notes.get(name, 0) + documents

    def plain(self) -> dict[str, Any]:
        return {source: tally.plain() for source, tally in sorted(self.sources.items())}

    def save(self, path: Path) -> None:
        """Writes the counts to a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.plain()), encoding="utf-8")

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Tally":
        """Makes a tally from the dict that `plain` returned."""
        tally = cls()
        for source, counts in plain.items():
            tally.of(source).merge(
                SourceTally(
                    came_in=Amount(**counts["in"]),
                    kept=Amount(**counts["kept"]),
                    passed_on=Amount(**counts["passed_on"]),
                    dropped={reason: Amount(**amount) for reason, amount in counts["dropped"].items()},
                    notes=dict(counts["notes"]),
                )
            )
        return tally

    @classmethod
    def merged(cls, tallies: Iterable["Tally"]) -> "Tally":
        """Adds up several tallies, source by source."""
        total = cls()
        for tally in tallies:
            for source, theirs in tally.sources.items():
                total.of(source).merge(theirs)
        return total

    @classmethod
    def load_all(cls, folder: Path) -> "Tally":
        """Adds up the tallies (JSON files) that the tasks of a stage wrote to `folder`."""
        return cls.merged(cls.from_plain(json.loads(path.read_text())) for path in sorted(folder.glob("*.json")))

    def total(self) -> SourceTally:
        """Adds up the counts of all sources; canaries, planted documents, are in no sum."""
        whole = SourceTally()
        for source, mine in self.sources.items():
            if not is_canary(source):
                whole.merge(mine)
        return whole

    def check(self, stage: str, before: "Tally | None" = None) -> None:
        """Raises LedgerError unless, for each source, came_in = kept + dropped = what `before` passed on."""
        for source, tally in self.sources.items():
            for unit in ("documents", "bytes"):
                came_in = getattr(tally.came_in, unit)
                kept = getattr(tally.kept, unit)
                dropped = sum(getattr(amount, unit) for amount in tally.dropped.values())
                if came_in != kept + dropped:
                    raise LedgerError(
                        f"stage {stage}, source {source}: {came_in} {unit} came in, but {kept} were kept and "
                        f"{dropped} dropped; {abs(came_in - kept - dropped)} are unaccounted for"
                    )
        if before is None:
            return
        for source in self.sources.keys() | before.sources.keys():
            # `of` would add an entry for a source that is in one of the two tallies only.
            passed_on = before.sources.get(source, SourceTally()).passed_on
            came_in_amount = self.sources.get(source, SourceTally()).came_in
            if passed_on != came_in_amount:
                raise LedgerError(
                    f"stage {stage}, source {source}: the stage before passed on {passed_on.plain()}, "
                    f"but {came_in_amount.plain()} came in"
                )
