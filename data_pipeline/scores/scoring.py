"""Datatrove step of the score stage: writes a Parquet row of quality scores per document.

The scores are those of `scan.scores`, by the document's rule set, and those of `model_scores` if models are configured.
`filtering` applies thresholds later, without the text.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from datatrove.data import Document

from configs.rules import RuleSet
from configs.scores import ScoresConfig
from data_pipeline.core.tables import TableStep
from data_pipeline.scan.scores import Definition, Scanner, quality
from data_pipeline.scan.words import Splitter
from data_pipeline.scores.model_scores import ModelScores, kept_model_scores

HEAD_CHARS = 300


def definition_of(rules: RuleSet) -> Definition:
    """Returns the settings of a rule set on which scores depend; the language is set later, per document.

    Raises ValueError if the list of bad words does not exist.
    """
    words: tuple[str, ...] = ()
    if rules.bad_words_file:
        path = Path(rules.bad_words_file)
        if not path.is_file():
            raise ValueError(f"bad_words_file {path} does not exist, seen from {Path.cwd()}; correct the path")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"bad_words_file {path} is not UTF-8 ({error}); convert it to UTF-8") from None
        words = tuple(sorted({line.strip().lower() for line in lines} - {""}))
    return Definition(Splitter[rules.splitter], rules.stop_words, rules.c4, words)


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
