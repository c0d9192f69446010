"""Config section [scores] of a data run: the models that compute scores, and the documents that they score.

A score whose model has no path does not exist, and a rule on it is an error. The scores are computed in
`data_pipeline.scores.classifier` and `data_pipeline.scores.ngram_models`; thresholds are in `configs.rules.RuleSet`.
"""

from typing import Literal

from configs.section import Section

# Score -> the key of ScoresConfig that names its model.
MODEL_OF = {"classifier_score": "classifier", "unigram_logprob": "unigrams", "perplexity": "arpa"}


class ScoresConfig(Section):
    """Local paths of models. Documents in none of `languages` get NaN as their scores, which breaks no rule."""

    classifier: str = ""
    """The path of a quality classifier of `trivium data train-classifier`, or of a fastText model; empty for none."""
    classifier_label: str = "good"
    """The label whose probability is the score classifier_score, without its __label__."""
    unigrams: str = ""
    """The path of word frequencies, TSV (word, count) or JSON ({word: count}), gzipped or not; empty for none."""
    arpa: str = ""
    """The path of an n-gram model in ARPA format, gzipped or not, never a KenLM binary; empty for none."""
    languages: tuple[str, ...] = ()
    """The languages whose documents are scored, as codes of lid.176; empty for all."""
    splitter: Literal["spaces", "words", "cjk"] = "words"
    """The way in which the texts that unigrams and arpa were counted on were split into words."""
    lower_case: bool = True
    """Whether unigrams and arpa were counted on text in lower case."""

    def missing(self, score: str) -> str:
        """Key of this section that must be set for `score` to exist; "" if it is set or the score needs no model."""
        key = MODEL_OF.get(score, "")
        return key if key and not getattr(self, key) else ""

    def paths(self) -> dict[str, str]:
        """Returns the paths of the models that are set, by key."""
        return {key: getattr(self, key) for key in MODEL_OF.values() if getattr(self, key)}
