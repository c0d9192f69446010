"""All heuristics of a FineWeb recipe in one scan, against datatrove's four filters one after the other.

English is judged by datatrove's bounds on words that the compiled scan finds; the sets named @datatrove count spaCy's,
which takes longer (`agreement` holds those against datatrove). A verdict that differs is computed again by our code on
datatrove's words (spaCy's, or jieba's for Chinese) and, for C4, with its count of sentences. What then agrees is
explained by that definition, and counted under the rule that it moves over its bound: one that drops the document on
datatrove's words alone, or on ours alone.
"""

from collections import Counter
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.text import split_into_sentences, split_into_words

from configs.rules import RuleSet
from data_pipeline.scan.scores import Definition, Scanner, definition_of
from data_pipeline.scan.words import Splitter
from data_pipeline.scores.filtering import verdict
from tests.bench.data_pipeline.measure import LANGUAGES, Result, cpu_seconds, size_mb, texts

_ZH = RuleSet(use=("fineweb2_zh",)).bounds()


def rule_sets(source: str) -> dict[str, RuleSet]:
    """Returns Trivium's rules with the thresholds of each datatrove filter, by the filter's name."""
    if source == "english":
        names = {
            "repetition": ("gopher_repetition@datatrove",),
            "quality": ("gopher_quality@datatrove",),
            "c4": ("c4@fineweb", "gopher_repetition@datatrove"),
            "fineweb": ("fineweb@datatrove", "gopher_repetition@datatrove"),
        }
        found = {name: RuleSet(use=use, splitter="words") for name, use in names.items()}
        repetition = tuple(found["repetition"].bounds())
        return {
            name: rules
            if name in ("repetition", "quality")
            else RuleSet(use=names[name], splitter="words", without=repetition)
            for name, rules in found.items()
        }
    parts = {
        "repetition": [name for name in _ZH if "gram" in name],
        "quality": [name for name in _ZH if name.split("_")[0] in ("word", "mean", "hash", "ellipsis", "bullet")]
        + ["alpha_word_ratio", "stop_word_count"],
        "fineweb": ["line_punct_ratio", "char_dup_ratio", "newline_ratio"],
    }
    return {name: RuleSet(use=("fineweb2_zh",), without=tuple(set(_ZH) - set(kept))) for name, kept in parts.items()}


def peers(source: str) -> dict[str, Any]:
    """Returns datatrove's filters, with its defaults for English and FineWeb-2's thresholds for Chinese."""
    language = LANGUAGES[source]
    if source == "english":
        return {
            "repetition": GopherRepetitionFilter(),
            "quality": GopherQualityFilter(),
            "c4": C4QualityFilter(filter_no_terminal_punct=False),
            "fineweb": FineWebQualityFilter(),
        }
    top = tuple((n, _ZH[f"top_{n}_gram"].max) for n in (2, 3, 4))
    dup = tuple((n, _ZH[f"dup_{n}_gram"].max) for n in range(5, 11))
    return {
        "repetition": GopherRepetitionFilter(
            dup_line_frac=None, dup_para_frac=None, dup_line_char_frac=None, dup_para_char_frac=None,
            top_n_grams=top, dup_n_grams=dup, language=language,
        ),
        "quality": GopherQualityFilter(
            min_doc_words=100, max_doc_words=200000, min_avg_word_length=1, max_avg_word_length=5,
            max_non_alpha_words_ratio=0.735, stop_words=list(RuleSet(use=("fineweb2_zh",)).stop_words),
            language=language,
        ),
        "fineweb": FineWebQualityFilter(
            line_punct_thr=0.106, short_line_thr=1.0, char_duplicates_ratio=0.287, new_line_ratio=0.178,
            language=language,
        ),
    }  # fmt: skip


def run(source: str, megabytes: float) -> Result:
    documents = texts(source, megabytes)
    rules = rule_sets(source)
    scanner = Scanner(definition_of(rules["quality"]))
    c4 = Scanner(definition_of(rules["c4"])) if "c4" in rules else scanner
    theirs = peers(source)
    scanner.scores("Compiled before the clock starts.")
    for peer in theirs.values():
        peer.filter(Document(text="Loaded before the clock starts.", id="0"))

    ours = cpu_seconds(lambda: [c4.scores(text) for text in documents], times=3)
    split_into_words.__globals__["split_into_parts"].cache_clear()
    chained = cpu_seconds(lambda: [_chain(theirs, text) for text in documents])
    agree, why = _agreement(source, documents, rules, theirs, scanner, c4)
    return Result(
        f"heuristics, {source}",
        size_mb(documents),
        ours,
        chained,
        20,
        "datatrove: " + ", ".join(type(peer).__name__ for peer in theirs.values()),
        f"{agree:.1%} of verdicts; the others by {_said(why)}",
        {"documents": len(documents), "disagreements": dict(why)},
    )


def _chain(filters: dict[str, Any], text: str) -> bool:
    document = Document(text=text, id="0")
    return all(peer.filter(document) is True for peer in filters.values())


def _agreement(
    source: str,
    documents: list[str],
    rules: dict[str, RuleSet],
    theirs: dict[str, Any],
    scanner: Scanner,
    c4: Scanner,
) -> tuple[float, Counter[str]]:
    """Returns (share of equal verdicts over documents and filters, explanations of the others with their counts)."""
    equal, why = 0, Counter[str]()
    definition = Definition(Splitter.spacy, rules["quality"].stop_words)  # counts n-grams of n words as datatrove does
    on_their_words = Scanner(definition)
    for text in documents:
        for name, peer in theirs.items():
            with np.errstate(all="ignore"):
                kept = peer.filter(Document(text=text, id="0")) is True
            scores = (c4 if name == "c4" else scanner).scores(text)
            if (verdict(scores, rules[name]) == "") == kept:
                equal += 1
                continue
            again = dict(scores) if name == "c4" else on_their_words.scores(text, spans(text, LANGUAGES[source]))
            if name == "c4":
                again["c4_sentences"] = _their_sentences(text, LANGUAGES[source])
            explained = (verdict(again, rules[name]) == "") == kept
            rule = verdict(scores if kept else again, rules[name])
            whose = "our" if kept else "jieba's" if source == "chinese" else "spaCy's"
            unit = "sentences" if name == "c4" else "words"
            why[f"{rule} on {whose} {unit} alone" if explained else f"{name}: unexplained"] += 1
    return equal / (len(documents) * len(theirs)), why


def spans(text: str, language: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns (starts, ends) of datatrove's words, in characters."""
    starts, position = [], 0
    words = split_into_words(text, language)
    for word in words:
        position = text.index(word, position)
        starts.append(position)
        position += len(word)
    lengths = np.array([len(word) for word in words], np.int32)
    return np.array(starts, np.int32), np.array(starts, np.int32) + lengths


def _their_sentences(text: str, language: str) -> float:
    """Returns datatrove's number of sentences in the lines that FineWeb's form of C4's rules keeps."""
    document = Document(text=text, id="0")
    kept = C4QualityFilter(filter_no_terminal_punct=False, min_num_sentences=0).filter(document)
    lines = document.text.splitlines() if kept is True else []
    return float(sum(len(split_into_sentences(line, language)) for line in lines))


def _said(why: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in why.most_common()) or "nothing: there are none"
