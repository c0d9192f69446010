"""The web_lines stage: lines that a document's rule set drops, by C4's or RefinedWeb's rules, are cut.

Which lines these are is in `scan.web_lines`. Documents are cut after they were judged and deduplicated, where the
published pipelines cut first and judge what is left: the scores `c4_sentences` and `refinedweb_word_ratio` already
count the lines that stay.
"""

from collections.abc import Mapping
from typing import Any

from datatrove.data import Document

from configs.rules import RuleSet
from data_pipeline.core.tables import read_table
from data_pipeline.cutting.cuts import Cut, CutStep, byte_offsets
from data_pipeline.scan.scores import Scanner
from data_pipeline.scores.scoring import definition_of


class CutWebLines(CutStep):
    """Cuts with reasons `<rules>_<why>`, such as c4_policy; `rules` are those that drop lines, by name."""

    name = "Web lines"

    def __init__(self, folder: str, tallies: str, select: str, rules: Mapping[str, RuleSet], language: str) -> None:
        super().__init__(folder, tallies, select)
        self.rules = rules
        self.language = language
        self._scanners: dict[str, Scanner] = {}
        self._rules_of: dict[int, str] = {}

    def open_shard(self, shard: str) -> None:
        super().open_shard(shard)
        table = read_table(self.language, shard)
        self._rules_of = dict(zip(table["row"].to_pylist(), table["rules"].to_pylist(), strict=True))

    def find(self, document: Document) -> tuple[list[Cut], dict[str, Any]]:
        name = self._rules_of[document.metadata["row"]]
        if name not in self.rules:
            return [], {}
        if name not in self._scanners:  # in the worker: scanners do not travel between processes
            self._scanners[name] = Scanner(definition_of(self.rules[name]))
        found = [
            (start, end, f"{which}_{reason}")
            for which in self.rules[name].drop_lines
            for start, end, reason in self._scanners[name].dropped_lines(document.text, which)
        ]
        positions = byte_offsets(document.text, [position for start, end, _ in found for position in (start, end)])
        spans = zip(positions[::2], positions[1::2], found, strict=True)
        return [Cut(start, end, "", reason) for start, end, (_, _, reason) in spans], {}
