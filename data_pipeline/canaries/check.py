"""Checks what became of each planted canary against the fate that its config expects.

A canary with another fate is an alarm. Only tables and samples of dropped documents are read.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.canaries import DUPLICATES, KEPT, REPEATS, CanaryConfig
from data_pipeline.canaries.plant import FATES, id_of, numbered
from data_pipeline.core.canary_naming import canaries_of
from data_pipeline.core.tables import TABLE_STAGES, read_table


@dataclass(frozen=True)
class CanaryFate:
    """Fate of one planted text: the reason why it was first dropped, "" if never, and the reasons of all its cuts."""

    id: str
    reason: str
    cuts: frozenset[str]

    def caught_by(self, reason: str) -> bool:
        """Whether the text was dropped for `reason` or, if it was kept, cut for it."""
        return self.reason == reason or (not self.reason and reason in self.cuts)

    def __str__(self) -> str:
        if self.reason:
            return f"dropped for {self.reason}"
        return f"cut for {' and '.join(sorted(self.cuts))}" if self.cuts else KEPT


def check_canaries(run_dir: Path, canaries: Mapping[str, CanaryConfig], done: Collection[str]) -> list[dict[str, Any]]:
    """Returns each canary's name, source and expected reason, the fates of its texts, and whether they are as expected.

    `done` are the finished stages of the run; a run with another config may have left folders of other stages. Returns
    [] until the documents stage is done, which is the last that sees canaries.
    """
    if "documents" not in done:
        return []
    stages = [name for name in TABLE_STAGES if name in done]
    found = []
    for name, (number, canary) in numbered(canaries).items():
        seen = _seen(run_dir, stages, f"{canaries_of(canary.source)}/{number:04d}")
        texts = [seen[id_of(name, index)] for index in range(len(canary.texts))]
        entry = {"name": name, "source": canary.source, "reason": canary.reason}
        found.append(entry | {"texts": {one.id: str(one) for one in texts}, "caught": _right(canary.reason, texts)})
    return found


def missed(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for each canary, as `check_canaries` describes it, whose fate is not the expected one."""
    return [
        f"canary {one['name']!r} of {one['source']} should be {_expected(one['reason'], len(one['texts']))}; "
        + ", ".join(f"{text} was {fate}" for text, fate in one["texts"].items())
        for one in found
        if not one["caught"]
    ]


def _right(reason: str, texts: list[CanaryFate]) -> bool:
    """Whether the texts of a canary have the fates that `reason` stands for."""
    if reason == KEPT:
        return all(not one.reason and not one.cuts for one in texts)
    caught = sum(one.caught_by(reason) for one in texts)
    if reason in DUPLICATES:
        return caught == len(texts) - 1 and sum(not one.reason for one in texts) == 1
    return caught >= 1 if reason in REPEATS else caught == len(texts)


def _expected(reason: str, texts: int) -> str:
    """Describes, for messages, what should become of a canary with this many texts."""
    if reason == KEPT:
        return "kept whole"
    if reason in DUPLICATES:
        return f"dropped for {reason}, all but one of {texts}"
    return f"cut for {reason}" if reason in REPEATS else f"caught by {reason}"


def _seen(run_dir: Path, stages: Sequence[str], shard: str) -> dict[str, CanaryFate]:
    """Reads the fates, by id, of all texts of the canary whose shards' names begin with `shard`."""
    fates: dict[str, CanaryFate] = {}
    name = shard.replace("/", "-")
    for path in sorted([*run_dir.glob(f"extract/rejected/{name}.jsonl"), *run_dir.glob(f"extract/drops/{name}.jsonl")]):
        with path.open(encoding="utf-8") as lines:
            for record in map(json.loads, lines):
                fates[record["id"]] = CanaryFate(record["id"], record["reason"], frozenset())
    for stage in stages:
        for table in sorted(run_dir.glob(f"{stage}/{shard}-*.parquet")):
            for row in read_table(table.parent, table.stem).select(["id", "verdict"]).to_pylist():
                before = fates.get(row["id"])
                if before is None or not before.reason:
                    fates[row["id"]] = CanaryFate(row["id"], row["verdict"], frozenset())
    path = run_dir / "documents" / FATES
    if path.is_file():
        for record in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if record["id"] in fates:
                fates[record["id"]] = CanaryFate(record["id"], record["reason"], frozenset(record["cuts"]))
    return fates
