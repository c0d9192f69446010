"""Findings of a drill: the numbers of its runs held against each other, and its line of the table."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.files import file_sha256
from pretrain.logs.metrics_file import read_metrics

# What depends on the clock and the machine.
VARYING = ("tokens_per_s", "mfu", "memory_bytes", "save_copy_s")
SAME = "the same, bit by bit"
HEADER = f"{'drill':8}{'as expected':13}{'exit status':25}{'steps lost':>10}{'back after':>12}  numbers"
WIDTH = 120


@dataclass(frozen=True)
class Numbers:
    """The numbers of a run: of each step, and the SHA-256 of the files of weights and optimizer state at its end."""

    steps: Mapping[int, Mapping[str, Any]]
    state: Mapping[str, str]

    @classmethod
    def of_run(cls, run_dir: Path, last_step: int) -> "Numbers":
        """Reads the log of a run and the files of its checkpoint of `last_step`, of which there may be none."""
        records = (record for record in read_metrics(run_dir / "metrics.jsonl").records if "loss" in record)
        kept = {one["step"]: {key: value for key, value in one.items() if key not in VARYING} for one in records}
        folder = run_dir / "checkpoints" / f"step_{last_step}"
        return cls(kept, {file.name: file_sha256(file) for file in sorted(folder.glob("*.safetensors"))})

    def difference(self, other: "Numbers", until: int | None = None) -> str:
        """Says what is first different in another run, "" if nothing is; with `until` only steps up to it count."""
        for step in sorted(self.steps.keys() | other.steps.keys()):
            if until is not None and step > until:
                return ""
            here, there = self.steps.get(step), other.steps.get(step)
            if here is None or there is None:
                return f"step {step} is {'missing' if there is None else 'there too many'}"
            for key in sorted(here.keys() | there.keys()):
                if here.get(key) != there.get(key):
                    return f"from step {step} on: {key} is {there.get(key)}, not {here.get(key)}"
        if until is None and not self.state:
            return "there is no last checkpoint to compare with"
        if until is None and self.state != other.state:
            files = sorted(
                name for name in self.state.keys() | other.state.keys() if self.state.get(name) != other.state.get(name)
            )
            return f"of the weights or the optimizer at the end, in {', '.join(files)}"
        return ""


@dataclass
class DrillOutcome:
    """The course of one drill, and whether it was as expected.

    `statuses` are the exit statuses of each start, one of each launcher. `numbers` says how they compare with those of
    the run that nothing happened to. `problems` are what was not as it should be; `left_out` is why it was not done.
    """

    name: str
    fault: str = ""
    said: str = ""
    statuses: list[list[int]] = field(default_factory=list)
    steps_lost: int | None = None
    seconds: float | None = None
    numbers: str = ""
    problems: list[str] = field(default_factory=list)
    left_out: str = ""

    @property
    def passed(self) -> bool:
        """Whether all was as expected, or the drill was left out."""
        return not self.problems

    def expect(self, truth: bool, problem: str) -> None:
        """Notes a problem unless `truth` is true."""
        if not truth:
            self.problems.append(problem)

    def compare(self, wanted: Numbers, found: Numbers) -> None:
        """Notes whether a run ended with the numbers that it should have."""
        different = wanted.difference(found)
        self.numbers = f"different {different}" if different else SAME
        self.expect(not different, f"the numbers are not those of the uninterrupted run: different {different}")

    def lines(self) -> list[str]:
        """Returns the drill's line of the table, and the sentences below it."""
        if self.left_out:
            return [f"{self.name:8}{'left out':13}{self.left_out}"]
        shown = ", then ".join(" and ".join(map(str, statuses)) for statuses in self.statuses)
        lost = "-" if self.steps_lost is None else str(self.steps_lost)
        back = "-" if self.seconds is None else f"{self.seconds:.1f} s"
        numbers = "different" if self.numbers.startswith("different") else self.numbers  # all of it is told below
        word = "yes" if self.passed else "NO"
        first = f"{self.name:8}{word:13}{shown:25}{lost:>10}{back:>12}  {numbers}"
        told = [self.fault, *([f"it said: {self.said}"] if self.said else [])]
        told += [f"NOT AS EXPECTED: {problem}" for problem in self.problems]
        return [first, *(line for one in told for line in _indented(one))]

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def summary(outcomes: Sequence[DrillOutcome]) -> str:
    """Returns the last line of the output."""
    done = [one for one in outcomes if not one.left_out]
    failed = [one.name for one in done if not one.passed]
    out = f", {len(outcomes) - len(done)} left out" if len(done) < len(outcomes) else ""
    if failed:
        return f"{len(failed)} of {len(done)} drills did not go as expected: {', '.join(failed)}{out}."
    return f"{len(done)} of {len(done)} drills went as expected{out}."


def as_record(facts: Mapping[str, Any], outcomes: Sequence[DrillOutcome]) -> bytes:
    """Returns the content of drill.json."""
    record = {**facts, "passed": all(one.passed for one in outcomes), "drills": [one.as_json() for one in outcomes]}
    return json.dumps(record, indent=1).encode()


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False)
