"""Quality and repetition scores of a text: every number that a rule can bound, computed once and kept.

Definitions follow the published ones, by the words that the rule set's splitter gives: Gopher quality and
repetition (Rae et al. 2021, arXiv 2112.11446, appendix A) in the reading of datatrove's filters, FineWeb's
line rules (Penedo et al. 2024, arXiv 2406.17557), line-length rules for code (Li et al. 2023, arXiv
2305.06161). Left out: C4's rules, bad-word lists, model-based scores. Thresholds are applied by `filtering`.
"""

import re
from collections import Counter

import numpy as np
from datatrove.data import Document

from configs.data import ANY_LANGUAGE, DataConfig, RuleSet
from data_pipeline.tables import TableStep
from data_pipeline.words import Coded, ngram_hashes, split, window

TOP_NGRAMS = (2, 3, 4)
DUP_NGRAMS = (5, 6, 7, 8, 9, 10)
SHORT_LINE = 30  # characters, FineWeb
HEAD_CHARS = 300

_PARAGRAPH_BREAK = re.compile(r"\n{2,}")
_LINE_BREAK = re.compile(r"\n+")
_NOT_ALNUM = re.compile(r"[\W_]+")
_TERMINAL = tuple(".?!。？！…:;：；\"'”’」』)）")
_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")


def scores(text: str, rules: RuleSet) -> dict[str, float]:
    """Score name -> value, for every score that `RuleSet` can bound but `language_score`.

    `text` is not empty.
    """
    words = Coded.of(split(text, rules.splitter))
    return {
        **_quality(text, words, frozenset(rules.stop_words)),
        **_duplicates(text),
        **_ngrams(text, words, rules),
        **_lines(text, len(words.ids)),
    }


def quality(values: dict[str, float]) -> float:
    """One number in [0, 1] to choose among near-duplicates by: whole words, whole lines, no repetition."""
    return (
        values["alpha_word_ratio"] * (1 - values["dup_5_gram"]) * (0.5 + 0.5 * values["line_punct_ratio"])
        if values["word_count"]
        else 0.0
    )


def _quality(text: str, words: Coded, stop_words: frozenset[str]) -> dict[str, float]:
    lengths = np.fromiter(map(len, words.unique), np.int64, len(words.unique))
    counts = np.bincount(words.ids, minlength=len(words.unique))
    sounded = np.fromiter(
        (word.isalnum() or any(map(str.isalnum, word)) for word in words.unique), bool, len(words.unique)
    )
    lettered = np.fromiter(
        (word.isalpha() or any(map(str.isalpha, word)) for word in words.unique), bool, len(words.unique)
    )
    total = max(len(words.ids), 1)
    counted = int(counts[sounded].sum())
    lines = text.splitlines() or [""]
    return {
        "word_count": float(counted),
        "mean_word_length": float((lengths * counts)[sounded].sum() / max(counted, 1)),
        "hash_ratio": text.count("#") / total,
        "ellipsis_ratio": (text.count("...") + text.count("…")) / total,
        "bullet_line_ratio": sum(line.lstrip().startswith(_BULLETS) for line in lines) / len(lines),
        "ellipsis_line_ratio": sum(line.rstrip().endswith(_ELLIPSES) for line in lines) / len(lines),
        "alpha_word_ratio": float(counts[lettered].sum() / total),
        "stop_word_count": float(len(stop_words.intersection(words.unique))),
    }


def _duplicates(text: str) -> dict[str, float]:
    para_count, para_chars, paragraphs = _repeated(_PARAGRAPH_BREAK.split(text.strip()))
    line_count, line_chars, lines = _repeated(_LINE_BREAK.split(text))
    return {
        "dup_line_ratio": line_count / lines,
        "dup_line_char_ratio": line_chars / len(text),
        "dup_para_ratio": para_count / paragraphs,
        "dup_para_char_ratio": para_chars / len(text),
    }


def _repeated(parts: list[str]) -> tuple[int, int, int]:
    """(how many parts repeat an earlier one, their characters, how many parts there are)."""
    counts = Counter(parts)
    repeats = sum(count - 1 for count in counts.values())
    return repeats, sum((count - 1) * len(part) for part, count in counts.items()), len(parts)


def _ngrams(text: str, words: Coded, rules: RuleSet) -> dict[str, float]:
    sizes = [window(n, rules.splitter) for n in (*TOP_NGRAMS, *DUP_NGRAMS)]
    hashes = ngram_hashes(words.local_hashes(), sizes)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(words.lengths())])
    separators = 1 if rules.splitter == "spaces" else 0
    found: dict[str, float] = {}
    for n in TOP_NGRAMS:
        size = window(n, rules.splitter)
        found[f"top_{n}_gram"] = _top(hashes[size], ends, size, separators) / len(text)
    for n in DUP_NGRAMS:
        size = window(n, rules.splitter)
        found[f"dup_{n}_gram"] = _repeated_chars(hashes[size], ends, size) / len(text)
    return found


def _top(hashes: np.ndarray, ends: np.ndarray, size: int, separators: int) -> int:
    """Characters covered by the most frequent n-gram, its inner spaces included; the earliest wins a tie."""
    if not len(hashes):
        return 0
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    most = counts.max()
    start = int(first[counts == most].min())
    return int(most) * int(ends[start + size] - ends[start] + separators * (size - 1))


def _repeated_chars(hashes: np.ndarray, ends: np.ndarray, size: int) -> int:
    """Characters of words in n-grams seen before, left to right, no word counted twice."""
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    candidates = np.flatnonzero(counts[inverse] > 1)  # an n-gram that occurs once is never met again
    seen: set[int] = set()
    total = free_from = 0
    for place, value in zip(candidates.tolist(), hashes[candidates].tolist(), strict=True):
        if place < free_from:
            continue
        if value in seen:
            total += int(ends[place + size] - ends[place])
            free_from = place + size
        else:
            seen.add(value)
    return total


def _lines(text: str, words: int) -> dict[str, float]:
    lines = [line for line in text.split("\n") if line.strip()]
    lengths = [len(line) for line in lines] or [0]
    return {
        "line_punct_ratio": sum(line.rstrip().endswith(_TERMINAL) for line in lines) / max(len(lines), 1),
        "short_line_ratio": sum(length <= SHORT_LINE for length in lengths) / len(lengths),
        "newline_ratio": text.count("\n") / max(words, 1),
        "mean_line_length": sum(lengths) / len(lengths),
        "max_line_length": float(max(lengths)),
        "alnum_ratio": len(_NOT_ALNUM.sub("", text)) / max(len(text), 1),
    }


def rule_set_of(config: DataConfig, source: str, language: str) -> str | None:
    """The name of the rule set for a document; None when the source does not expect its language."""
    rules = config.sources[source].rules
    return rules.get(language, rules.get(ANY_LANGUAGE))


class Score(TableStep):
    """A parquet row of scores per document; the language stage says which and by which rules."""

    name = "Score"

    def __init__(self, folder: str, tallies: str, config: DataConfig, language: str) -> None:
        super().__init__(folder, tallies, select=language)
        self.rules = config.rules

    def measure(self, document: Document, before: dict[str, object]) -> dict[str, object]:
        values = scores(document.text, self.rules[str(before["rules"])])
        return {
            "rules": before["rules"],
            "language_score": before["language_score"],
            "chars": len(document.text),
            "quality": quality(values),
            **values,
            "head": document.text[:HEAD_CHARS],
        }
