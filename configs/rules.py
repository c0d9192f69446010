"""Rule sets: thresholds on scores. Published sets are in rules.toml, by name and definition, and can be combined.

The scores are defined where they are computed, in `data_pipeline.scan.scores`. If two sets bound the same score, the
stricter bound applies. Sets that differ in what a word, a stop word or a C4 line is can be combined only if the config
sets that key itself, beside `use`.
"""

import difflib
import functools
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from configs.section import Section

MEANINGS = ("splitter", "stop_words", "c4")


class Bound(Section):
    """The range of values that a score may have, ends included."""

    min: float | None = None
    """The minimum; left out, there is none."""
    max: float | None = None
    """The maximum; left out, there is none."""

    @model_validator(mode="after")
    def _not_empty(self) -> "Bound":
        if self.min is None and self.max is None:
            raise ValueError("a rule needs min, max or both; leave the rule out to switch it off")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(
                f"min = {self.min} is above max = {self.max}; lower min or raise max (give both, where a set in use "
                "sets the other one)"
            )
        return self


class RuleSet(Section):
    """Thresholds by score name; a score without a threshold is stored but drops nothing."""

    use: tuple[str, ...] = ()
    """Published sets of configs/rules.toml, by name; keys beside `use` replace those of the sets."""
    without: tuple[str, ...] = ()
    """Rules of the sets in use that are switched off."""
    splitter: Literal["spaces", "words", "cjk", "spacy"] = "spaces"
    """Definition of a word: text between white space (spaces), a run of letters (words), a run of letters or one CJK
    character (cjk), or an English token of spaCy (spacy, which also compares n-grams of five words and more without the
    spaces between them, as datatrove does); left out, as in the sets in use."""
    stop_words: tuple[str, ...] = ()
    """The words that stop_word_count and stop_word_total count; left out, those of the sets in use."""
    c4: Literal["paper", "reference", "datatrove", "fineweb"] = "datatrove"
    """The variant of C4's line rules; left out, that of the sets in use."""
    bad_words_file: str = ""
    """The file of the rule bad_words, with a word or phrase on each line; empty for none."""
    drop_lines: tuple[Literal["c4", "refinedweb"], ...] = ()
    """The published line rules (C4's, RefinedWeb's) that cut lines out of the documents that are kept."""

    language_score: Bound | None = None
    """The probability of the document's language."""
    language_share: Bound | None = None
    """The share of characters in paragraphs of the document's own language; needs language.paragraphs."""
    word_count: Bound | None = None
    """The number of words with a letter or digit in them."""
    mean_word_length: Bound | None = None
    """The mean length of words with a letter or digit in them, in characters."""
    hash_ratio: Bound | None = None
    """The number of # signs for each word."""
    ellipsis_ratio: Bound | None = None
    """The number of ellipses (... or …) for each word."""
    bullet_line_ratio: Bound | None = None
    """The share of lines that begin with a bullet or a hyphen."""
    ellipsis_line_ratio: Bound | None = None
    """The share of lines that end in an ellipsis."""
    alpha_word_ratio: Bound | None = None
    """The share of words with a letter in them."""
    stop_word_count: Bound | None = None
    """The number of different stop words that occur."""
    stop_word_total: Bound | None = None
    """The number of occurrences of stop words."""
    dup_line_ratio: Bound | None = None
    """The share of lines equal to an earlier one."""
    dup_line_char_ratio: Bound | None = None
    """The share of characters in lines equal to an earlier one."""
    dup_para_ratio: Bound | None = None
    """The share of paragraphs equal to an earlier one."""
    dup_para_char_ratio: Bound | None = None
    """The share of characters in paragraphs equal to an earlier one."""
    top_2_gram: Bound | None = None
    """The share of characters in occurrences of the most frequent 2-gram of words."""
    top_3_gram: Bound | None = None
    """The share of characters in occurrences of the most frequent 3-gram of words."""
    top_4_gram: Bound | None = None
    """The share of characters in occurrences of the most frequent 4-gram of words."""
    dup_5_gram: Bound | None = None
    """The share of characters in 5-grams of words that occurred before."""
    dup_6_gram: Bound | None = None
    """The share of characters in 6-grams of words that occurred before."""
    dup_7_gram: Bound | None = None
    """The share of characters in 7-grams of words that occurred before."""
    dup_8_gram: Bound | None = None
    """The share of characters in 8-grams of words that occurred before."""
    dup_9_gram: Bound | None = None
    """The share of characters in 9-grams of words that occurred before."""
    dup_10_gram: Bound | None = None
    """The share of characters in 10-grams of words that occurred before."""
    line_punct_ratio: Bound | None = None
    """The share of lines, blank ones apart, that end in terminal punctuation."""
    short_line_ratio: Bound | None = None
    """The share of lines, blank ones apart, of at most 30 characters."""
    char_dup_ratio: Bound | None = None
    """The share of characters in lines, blank ones apart, equal to an earlier one (FineWeb)."""
    newline_ratio: Bound | None = None
    """The number of line breaks for each word."""
    mean_line_length: Bound | None = None
    """The mean length of lines, blank ones apart, in characters."""
    max_line_length: Bound | None = None
    """The length of the longest line, in characters."""
    alnum_ratio: Bound | None = None
    """The share of characters that are letters or digits."""
    generated_markers: Bound | None = None
    """The number of phrases among the first 2,000 characters that say a file is generated."""
    licence_markers: Bound | None = None
    """The number of phrases among the first 2,000 characters that name a licence or a copyright."""
    c4_lorem_ipsum: Bound | None = None
    """Whether "lorem ipsum" occurs in what C4 looks at: 1 or 0."""
    c4_curly_bracket: Bound | None = None
    """Whether a curly bracket occurs in what C4 looks at: 1 or 0."""
    c4_sentences: Bound | None = None
    """The number of sentences in the lines that C4's line rules keep."""
    refinedweb_word_ratio: Bound | None = None
    """The share of words in lines that RefinedWeb's line rules drop."""
    bad_words: Bound | None = None
    """The number of occurrences of words or phrases of bad_words_file."""
    classifier_score: Bound | None = None
    """The probability of scores.classifier_label; needs scores.classifier."""
    unigram_logprob: Bound | None = None
    """The mean logarithm to base 10 of the words' frequencies; needs scores.unigrams."""
    perplexity: Bound | None = None
    """The perplexity under an n-gram model; needs scores.arpa."""

    @model_validator(mode="before")
    @classmethod
    def _use(cls, own: Any) -> Any:
        if not isinstance(own, dict):
            return own
        # The result is validated as Python values, no longer as JSON, so lists must be tuples.
        keys = combined(own.get("use") or (), own)
        return {name: tuple(value) if isinstance(value, list) else value for name, value in keys.items()}

    @model_validator(mode="after")
    def _sound(self) -> "RuleSet":
        for name in self.without:
            if not isinstance(getattr(self, name, None), Bound):
                has = ", ".join(self.bounds())
                remedy = f"it has {has}" if has else "it has none, so leave without out"
                raise ValueError(f"without = {name!r} is no rule of this set; {remedy}")
        if "bad_words" in self.bounds() and not self.bad_words_file:
            raise ValueError(
                "the rule bad_words needs bad_words_file, a list with a word or phrase on each line; "
                'name one, or add without = ["bad_words"]'
            )
        return self

    def bounds(self) -> dict[str, Bound]:
        """Returns the rules that are on, in the order in which they are tried."""
        return {
            name: value
            for name in type(self).model_fields
            if name not in self.without and isinstance(value := getattr(self, name), Bound)
        }


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """Returns rules.toml: the keys of each published rule set by its name@definition."""
    return tomllib.loads(Path(__file__).with_name("rules.toml").read_text(encoding="utf-8"))


def combined(names: Sequence[str], own: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of all published sets in `names`, with those in `own` replacing them (min and max separately).

    Raises ValueError for an unknown name, or if sets differ in a key of `MEANINGS` that `own` does not set.
    """
    merged: dict[str, Any] = {}
    meant: dict[str, dict[str, Any]] = {}  # for each key of MEANINGS, its value in each set
    for name in names:
        if name not in catalogue():
            close = difflib.get_close_matches(name, catalogue(), n=1, cutoff=0.3)
            raise ValueError(
                f"use names the rule set {name!r}, which does not exist"
                + (f"; did you mean {close[0]!r}?" if close else "")
                + f" Known: {', '.join(sorted(catalogue()))}"
            )
        for key, value in catalogue()[name].items():
            if key not in MEANINGS:
                merged[key] = _stricter(merged[key], value) if key in merged else value
            else:
                merged[key] = value
                meant.setdefault(key, {})[name] = value
    open_to = {
        key: said for key, said in meant.items() if key not in own and any(v != merged[key] for v in said.values())
    }
    if open_to:
        differing = "; ".join(
            f"{key} is {' and '.join(f'{value!r} in {name}' for name, value in said.items())}"
            for key, said in open_to.items()
        )
        raise ValueError(
            f"use = {list(names)} joins sets that mean different things ({differing}); write "
            f"{' and '.join(f'{key} = ...' for key in open_to)} beside use to choose, or use sets of one definition"
        )
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merged[key] | value if both else value
    return merged


def _stricter(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    chosen = one | other
    for side, choose in (("min", max), ("max", min)):
        if side in one and side in other:
            chosen[side] = choose(one[side], other[side])
    return chosen
