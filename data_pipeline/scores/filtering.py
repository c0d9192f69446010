"""Filter of documents by thresholds on their scores, which gives each a verdict: "" or the reason for dropping it.

The filter reads only score tables and no text, so that applying a changed threshold takes seconds. The reason is
`<score>_min` or `<score>_max`, of the first rule that is broken in the order of `RuleSet`'s fields.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from configs.rules import RuleSet
from data_pipeline.core.ledger import Tally
from data_pipeline.core.progress import ProgressFile
from data_pipeline.core.tables import KEYS, read_table, write_samples, write_table


def verdict(values: Mapping[str, Any], rules: RuleSet) -> str:
    """Returns the reason why `rules` drop a document with these scores, or "" if they keep it.

    Bounds on scores that `values` lacks are skipped.
    """
    for name, bound in rules.bounds().items():
        if name not in values:
            continue
        if bound.min is not None and values[name] < bound.min:
            return f"{name}_min"
        if bound.max is not None and values[name] > bound.max:
            return f"{name}_max"
    return ""


def broken(table: pa.Table, rules: Mapping[str, RuleSet]) -> dict[str, np.ndarray]:
    """Returns {reason: bool [rows], whether the row breaks that rule}, in the order in which rules are tried.

    `rules` are rule sets by name; the table's column `rules` names the rule set of each row.
    """
    named = np.array(table["rules"].to_pylist(), dtype=object)
    bounds = {set_name: one.bounds() for set_name, one in rules.items()}
    found: dict[str, np.ndarray] = {}
    for name in RuleSet.model_fields:
        sides = [
            (f"{name}_{side}", side, set_name, limit)
            for set_name, bounds_of_set in bounds.items()
            if (bound := bounds_of_set.get(name)) and name in table.column_names
            for side, limit in (("min", bound.min), ("max", bound.max))
            if limit is not None
        ]
        for reason, side, set_name, limit in sorted(sides, key=lambda entry: entry[1], reverse=True):
            values = table[name].to_numpy()
            outside = values < limit if side == "min" else values > limit
            found.setdefault(reason, np.zeros(len(named), bool))
            found[reason] |= outside & (named == set_name)
    return found


def verdicts(table: pa.Table, rules: Mapping[str, RuleSet]) -> np.ndarray:
    """Returns the verdict on each row of scores, as `verdict` gives it: strings, object [rows]."""
    found = np.full(table.num_rows, "", dtype=object)
    for reason, rows in broken(table, rules).items():
        found[rows & (found == "")] = reason
    return found


class ApplyRules(PipelineStep):
    """Reads the score tables of this task's shards, and writes verdict tables and samples of dropped documents."""

    name = "Rules"
    type = "🔻 - FILTER"

    def __init__(
        self,
        folder: str,
        scores: str,
        shards: Sequence[str],
        rules: dict[str, RuleSet],
        tallies: str,
        progress: str,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.scores = scores
        self.shards = list(shards)
        self.rules = rules
        self.tallies = tallies
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tally, progress = Tally(), ProgressFile(self.progress, rank)
        dropped: list[dict[str, Any]] = []
        for shard in self.shards[rank::world_size]:
            table = read_table(self.scores, shard)
            for source, size in zip(table["source"].to_pylist(), table["bytes"].to_pylist(), strict=True):
                tally.came_in(source, size)
                progress.advance(size)
            found = verdicts(table, self.rules)
            judged = table.set_column(
                table.schema.get_field_index("verdict"), "verdict", pa.array(found.tolist(), pa.string())
            )
            dropped.extend(self._sample(row) for row in judged.filter(pa.array(found != "")).to_pylist())
            write_table(self.folder, shard, judged.select([*KEYS, "chars", "quality", "head", "verdict"]))
        write_samples(self.folder, dropped)
        tally.save(Path(self.tallies) / f"in-{rank:05d}.json")
        progress.close()
        yield from ()

    @staticmethod
    def _sample(row: dict[str, Any]) -> dict[str, Any]:
        score = row["verdict"].rpartition("_")[0]
        return {**{key: row[key] for key in (*KEYS, "verdict", "head")}, score: row[score]}
