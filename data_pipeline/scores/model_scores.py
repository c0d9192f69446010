"""Scores that need a model, computed for documents in the configured languages.

`configs.model_scores` says which models there can be; `classifier` and `ngram_models` compute their scores. A document
in a language that is not configured gets NaN, which breaks no rule. A process reads its models once for all its tasks.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from configs.loader import ConfigError
from configs.model_scores import MODEL_OF, ScoresConfig
from data_pipeline.core.tables import FileKey, file_key
from data_pipeline.scan.words import Splitter
from data_pipeline.scores.classifier import load, manifest_path
from data_pipeline.scores.ngram_models import Arpa, Unigrams, check_arpa, check_unigrams

MODEL_SCORES = tuple(MODEL_OF)
_CHECKS = {"arpa": check_arpa, "unigrams": check_unigrams}  # of a file's beginning


def model_files(config: ScoresConfig) -> list[Path]:
    """Returns the files on which the scores depend; raises ConfigError for a model that does not exist.

    It is also raised for a file that does not begin like such a model, so that this is known before any work.
    """
    files = []
    for key, name in config.paths().items():
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"scores.{key} = {name!r} is not a file, seen from {Path.cwd()}; correct the path")
        if key in _CHECKS:
            try:
                _CHECKS[key](path)
            except (ValueError, OSError) as error:
                raise ConfigError(f"scores.{key} = {name!r}: {error}") from None
        files.append(path)
        if key == "classifier" and manifest_path(path).is_file():
            files.append(manifest_path(path))
    return files


def kept_model_scores(config: ScoresConfig) -> "ModelScores":
    """Returns the models of `config`, which are read again only if one of their files has changed since the last call.

    Each process holds one set of models at a time. Models have no state, so that scores do not depend on the documents
    or tasks before.
    """
    return _kept(config, tuple((path, file_key(path)) for path in model_files(config)))


@functools.lru_cache(maxsize=1)
def _kept(config: ScoresConfig, versions: tuple[tuple[Path, FileKey], ...]) -> "ModelScores":
    return ModelScores(config)


class ModelScores:
    """Function of (text, language) that returns the scores of all configured models, in the order of MODEL_SCORES."""

    def __init__(self, config: ScoresConfig) -> None:
        splitter, lower = Splitter[config.splitter], config.lower_case
        self._languages = config.languages
        self._models: dict[str, Callable[[str], float]] = {}
        if config.classifier:
            self._models["classifier_score"] = load(Path(config.classifier), config.classifier_label)
        if config.unigrams:
            self._models["unigram_logprob"] = Unigrams(Path(config.unigrams), splitter, lower)
        if config.arpa:
            self._models["perplexity"] = Arpa(Path(config.arpa), splitter, lower)

    def __call__(self, text: str, language: str) -> dict[str, float]:
        wanted = not self._languages or language in self._languages
        return {name: model(text) if wanted else float("nan") for name, model in self._models.items()}
