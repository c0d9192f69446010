"""Explains why datatrove drops a document that the demo's rules keep: by its definition of a rule, words or main text.

The document is judged again by Trivium's rules in datatrove's definitions (`configs/rules.toml`), then by these rules
on the words that datatrove finds. A document that neither explains is called unexplained.
"""

from functools import cache

from configs.rules import Bound, RuleSet
from data_pipeline.scan.scores import Definition, Scanner, definition_of
from data_pipeline.scan.words import Splitter
from data_pipeline.scores.filtering import verdict
from tests.bench.data_pipeline.heuristics import rule_sets, spans
from tests.bench.data_pipeline.measure import LANGUAGES

_FILTERS = {
    "GopherRepetitionFilter": "repetition",
    "GopherQualityFilter": "quality",
    "FineWebQualityFilter": "fineweb",
}


def why(step: str, source: str, text: str) -> str:
    """Returns the definition by which datatrove's `step` drops a document of a demo source.

    `text` is the document's text as Trivium extracts it.
    """
    if step in _FILTERS:
        rules, language = _rules(source, _FILTERS[step]), LANGUAGES.get(source, LANGUAGES["english"])
        if reason := verdict(_scanner(source, _FILTERS[step]).scores(text), rules):
            return f"{reason} as datatrove counts"
        on_words = Scanner(Definition(Splitter.spacy, rules.stop_words))
        if reason := verdict(on_words.scores(text, spans(text, language)), rules):
            return f"{reason} on {'jieba' if source == 'chinese' else 'spaCy'}'s words"
    if source == "web":
        return f"{step} on trafilatura's text"
    return f"{step}, unexplained"


@cache
def _rules(source: str, name: str) -> RuleSet:
    rules = rule_sets("chinese" if source == "chinese" else "english")[name]
    if (source, name) != ("web", "fineweb"):
        return rules
    return rules.model_copy(update={"char_dup_ratio": Bound(max=0.1)})


@cache
def _scanner(source: str, name: str) -> Scanner:
    return Scanner(definition_of(_rules(source, name)))
