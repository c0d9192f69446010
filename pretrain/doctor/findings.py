"""Findings of the doctor: one line each, with what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """Weight of a finding; a failure would end the run."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, what was found, and, unless all is well, what to do."""

    level: Severity
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.found}" + (f"; {self.remedy}" if self.remedy else "")


def ok(found: str) -> Finding:
    """Returns a finding that asks for nothing."""
    return Finding(Severity.OK, found)


def warning(found: str, remedy: str) -> Finding:
    """Returns a finding that costs time or may end the run later."""
    return Finding(Severity.WARNING, found, remedy)


def failure(found: str, remedy: str) -> Finding:
    """Returns a finding that would end the run."""
    return Finding(Severity.FAILURE, found, remedy)


def worst(findings: Iterable[Finding]) -> Severity:
    """Returns the gravest level of the findings, `ok` for none."""
    levels = list(Severity)
    return max((finding.level for finding in findings), key=levels.index, default=Severity.OK)
