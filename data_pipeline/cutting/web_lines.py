"""The web_lines stage: cuts the lines that C4's or RefinedWeb's rules drop, where a document's rule set has them.

`scan.web_line_rules` holds these rules. The published pipelines cut lines first and filter documents by what is left.
Here, documents are filtered and deduplicated first; the scores `c4_sentences` and `refinedweb_word_ratio` already take
account of the lines that will be cut.
"""

from collections.abc import Mapping
from typing import Any

from datatrove.data import Document

from configs.rules import RuleSet
from data_pipeline.core.tables import read_table
from data_pipeline.cutting.cuts import Cut, CutStep, byte_offsets
from data_pipeline.scan.scores import Scanner, definition_of


class CutWebLines(CutStep):
    """Step that cuts lines, with reasons such as `c4_policy`; `rules` are the rule sets that drop lines, by name."""

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
        if name not in self._scanners:  # made in the worker, since scanners cannot be sent to other processes
            self._scanners[name] = Scanner(definition_of(self.rules[name]))
        found = [
            (start, end, f"{which}_{reason}")
            for which in self.rules[name].drop_lines
            for start, end, reason in self._scanners[name].dropped_lines(document.text, which)
        ]
        positions = byte_offsets(document.text, [position for start, end, _ in found for position in (start, end)])
        spans = zip(positions[::2], positions[1::2], found, strict=True)
        return [Cut(start, end, "", reason) for start, end, (_, _, reason) in spans], {}
