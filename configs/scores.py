"""Scores that need a model: which models there are, and which documents they are for.

Without a path here its score does not exist, and a rule on it is an error. How the scores are computed is in
`data_pipeline.scores.classifier` and `data_pipeline.scores.ngram_models`; bounds on them: `configs.rules.RuleSet`.
"""

from typing import Literal

from configs.section import Section

# Score -> the key of ScoresConfig without which there is none.
MODEL_OF = {"classifier_score": "classifier", "unigram_logprob": "unigrams", "perplexity": "arpa"}


class ScoresConfig(Section):
    """Paths of models, local. Documents of other `languages` get NaN, which breaks no rule."""

    classifier: str = ""
    """The path of a quality classifier of `trivium data train-classifier`, or of a fastText model; empty for none."""
    classifier_label: str = "good"
    """The label whose probability is the score classifier_score, without its __label__."""
    unigrams: str = ""
    """The path of word frequencies, TSV (word, count) or JSON ({word: count}), gzipped or not; empty for none."""
    arpa: str = ""
    """The path of an n-gram model in ARPA format, gzipped or not, never a KenLM binary; empty for none."""
    languages: tuple[str, ...] = ()
    """The languages that the models are for, as codes of lid.176; empty for all."""
    splitter: Literal["spaces", "words", "cjk"] = "words"
    """How the texts that unigrams and arpa were counted on were split into words."""
    lower_case: bool = True
    """Whether unigrams and arpa were counted on text in lower case."""

    def missing(self, score: str) -> str:
        """The key to set before `score` exists; "" when it is set, or the score needs no model."""
        key = MODEL_OF.get(score, "")
        return key if key and not getattr(self, key) else ""

    def paths(self) -> dict[str, str]:
        """Key -> path of the models that are given."""
        return {key: getattr(self, key) for key in MODEL_OF.values() if getattr(self, key)}
