"""Thresholds on scores: the verdict on each document, from its row of scores alone.

Text is not read here, so that a changed threshold costs seconds. The reason for a drop is the first rule
broken, in the order of `RuleSet`'s fields: `<score>_min` or `<score>_max`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from configs.data import RuleSet
from data_pipeline.executor import ProgressFile
from data_pipeline.ledger import Tally
from data_pipeline.tables import KEYS, read_table, write_samples, write_table


def verdict(values: Mapping[str, Any], rules: RuleSet) -> str:
    """The reason why `rules` drop a document with these scores; "" when they keep it.

    Unknown scores are skipped.
    """
    for name, bound in rules.bounds().items():
        if name not in values:
            continue
        if bound.min is not None and values[name] < bound.min:
            return f"{name}_min"
        if bound.max is not None and values[name] > bound.max:
            return f"{name}_max"
    return ""


class ApplyRules(PipelineStep):
    """Reads the score tables of its shards, writes verdict tables and samples of what was dropped."""

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
        tally, progress, dropped = Tally(), ProgressFile(self.progress, rank), []
        for shard in self.shards[rank::world_size]:
            table = read_table(self.scores, shard)
            verdicts = []
            for row in table.to_pylist():
                tally.came_in(row["source"], row["bytes"])
                progress.advance(row["bytes"])
                row["verdict"] = verdict(row, self.rules[row["rules"]])
                verdicts.append(row["verdict"])
                if row["verdict"]:
                    dropped.append(self._sample(row))
            kept = table.select([*KEYS, "chars", "quality", "head"]).append_column(
                "verdict", pa.array(verdicts, pa.string())
            )
            write_table(self.folder, shard, kept)
        write_samples(self.folder, dropped)
        tally.save(Path(self.tallies) / f"in-{rank:05d}.json")
        progress.close()
        yield from ()

    @staticmethod
    def _sample(row: dict[str, Any]) -> dict[str, Any]:
        score = row["verdict"].rpartition("_")[0]
        return {**{key: row[key] for key in (*KEYS, "verdict", "head")}, score: row[score]}
