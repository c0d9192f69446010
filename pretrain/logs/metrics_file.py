"""Reads metrics.jsonl, one JSON object per line with the number of steps done as "step", and finds its broken lines."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MetricsFile:
    """The records of a metrics.jsonl in its order, and by line number (from 1) the lines that are no record."""

    records: list[dict[str, Any]]
    broken: dict[int, bytes]

    @property
    def warning(self) -> str:
        """Sentence about the broken lines; empty without any."""
        if not self.broken:
            return ""
        numbers = ", ".join(str(number) for number in list(self.broken)[:5])
        more = f" and {len(self.broken) - 5:,} more" if len(self.broken) > 5 else ""
        lines, be = ("line", "is") if len(self.broken) == 1 else ("lines", "are")
        return f"{lines} {numbers}{more} of metrics.jsonl {be} no JSON object with a step and left out"


def numbers(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns a record's numbers by name, without its step; those of nested dicts are named `outer/inner`."""
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and (prefix or key != "step"):
            found[prefix + key] = float(value)
    return found


def read_metrics(path: Path) -> MetricsFile:
    """Reads a metrics.jsonl; a missing file has no records. A last line that a kill cut short counts as not written."""
    records, broken = [], {}
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:  # no JSON, or not UTF-8
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):  # a newline follows, so the line was written whole
            broken[number] = line
    return MetricsFile(records, broken)
