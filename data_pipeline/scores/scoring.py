"""Datatrove step of the score stage: writes a Parquet row of quality scores per document.

The scores are those of `scan.scores`, by the document's rule set, and those of `model_scores` if models are configured.
`filtering` applies thresholds later, without the text.
"""

from collections.abc import Mapping
from dataclasses import replace

from datatrove.data import Document

from configs.model_scores import ScoresConfig
from data_pipeline.core.tables import TableStep
from data_pipeline.scan.scores import Definition, Scanner, quality
from data_pipeline.scores.model_scores import ModelScores, kept_model_scores

HEAD_CHARS = 300


class ScoreTexts(TableStep):
    """Writes a row of scores per document that the language stage kept, by the rule set that it has assigned."""

    name = "Score"

    def __init__(
        self,
        folder: str,
        tallies: str,
        definitions: Mapping[str, Definition],
        language: str,
        models: ScoresConfig,
    ) -> None:
        super().__init__(folder, tallies, select=language)
        self.definitions = definitions
        self.models = models
        self._model_scores: ModelScores | None = None
        self._scanners: dict[tuple[str, str], Scanner] = {}

    def measure(self, document: Document, before: dict[str, object]) -> dict[str, object]:
        rules, language = str(before["rules"]), str(before["language"])
        if (rules, language) not in self._scanners:  # made in the worker: scanners are not sent between processes
            self._scanners[rules, language] = Scanner(replace(self.definitions[rules], language=language))
        if self._model_scores is None:  # neither are models
            self._model_scores = kept_model_scores(self.models)
        values = self._scanners[rules, language].scores(document.text)
        share = {"language_share": before["language_share"]} if "language_share" in before else {}
        return {
            "rules": rules,
            "language_score": before["language_score"],
            **share,
            "chars": len(document.text),
            "quality": quality(values),
            **values,
            **self._model_scores(document.text, language),
            "head": document.text[:HEAD_CHARS],
        }
