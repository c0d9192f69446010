"""Tests scores against numbers worked out by hand, and verdicts against datatrove's filters on real documents."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import (
    c4_filters,
    fineweb_quality_filter,
    gopher_quality_filter,
    gopher_repetition_filter,
)

from configs.rules import Bound, RuleSet
from data_pipeline.scan.characters import codes_of, kinds_of
from data_pipeline.scan.english import words_of
from data_pipeline.scan.repetition import joined_duplicates, ngram_scores
from data_pipeline.scan.scores import SCORES, Definition, Scanner, definition_of, in_lower_case
from data_pipeline.scan.words import Splitter, describe, split
from data_pipeline.scores.filtering import verdict
from data_pipeline.scores.model_scores import MODEL_SCORES

ROOT = Path(__file__).parents[4]
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


def scores(text: str, splitter: str = "spaces", **keys: Any) -> dict[str, float]:
    return Scanner(Definition(Splitter[splitter], keys.pop("stop_words", STOP_WORDS), **keys)).scores(text)


def test_quality_by_hand() -> None:
    found = scores("the cat -- of 12 # cats...\n- a bullet\nend…")
    # words: the cat -- of 12 # cats... - a bullet end…  (11; 8 not all punctuation, 7 with a letter)
    assert found["word_count"] == 8
    assert found["mean_word_length"] == (3 + 3 + 2 + 2 + 7 + 1 + 6 + 4) / 8
    assert found["hash_ratio"] == 1 / 11
    assert found["ellipsis_ratio"] == 2 / 11
    assert found["bullet_line_ratio"] == 1 / 3
    assert found["ellipsis_line_ratio"] == 2 / 3
    assert found["alpha_word_ratio"] == 7 / 11
    assert (found["stop_word_count"], found["stop_word_total"]) == (2, 2)
    assert scores("the the of")["stop_word_total"] == 3


def test_repetition_by_hand() -> None:
    text = "one two\none two\n\none two\nsix"
    found = scores(text)
    assert found["dup_line_ratio"] == 2 / 4
    assert found["dup_line_char_ratio"] == 14 / len(text)
    assert found["dup_para_ratio"] == 0
    assert found["top_2_gram"] == 3 * len("one two") / len(text)
    repeated = "a b c d e f a b c d e g"
    assert scores(repeated)["dup_5_gram"] == 5 / len(repeated)  # "a b c d e", once again, without spaces
    assert scores(repeated)["dup_6_gram"] == 0
    assert scores("ab c d e f a bc d e f")["dup_5_gram"] == 0  # words are not joined
    assert scores("ab c d e f a bc d e f", "spacy")["dup_5_gram"] == 6 / 21  # as in datatrove, they are


# A rule of dots and a rule of hyphens, whose tokens repeat in another order; numbers; a cut that shifts by a sign.
SHIFTED = [
    "1 2 3 4 56 12 3 4 5 6",
    "-- - -- - -- - -- - - -- - --",
    "ab cde f g h a b c d efgh",
    "... . .. .... . ..... . .. ..",
]


@pytest.mark.parametrize("text", SHIFTED)
def test_datatroves_ngrams_are_joined_without_spaces(text: str) -> None:
    words = text.split()
    codes = codes_of(text)
    starts, ends = split(codes, kinds_of(codes), Splitter.spaces)
    sizes = list(range(2, 11))
    found = joined_duplicates(codes, starts, ends, np.array(sizes)).tolist()
    assert found == [gopher_repetition_filter.find_all_duplicate(words, size) for size in sizes]
    hashes, _ = describe(codes, kinds_of(codes), starts, ends)
    assert sum(found) > sum(ngram_scores(hashes, starts, ends, np.array(sizes), 0, 1).tolist())


def test_joined_ngrams_are_datatroves_for_any_words() -> None:
    draw = random.Random(7)
    sizes = list(range(2, 11))
    for _ in range(150):
        vocabulary = draw.choice([["a"], ["a", "aa", "aaa"], ["a", "b", "ab", "ba", "bab"], ["\0", "\0\0", "é", "鲸é"]])
        words = draw.choices(vocabulary, k=draw.randrange(0, 80))
        ends = np.cumsum([len(word) for word in words], dtype=np.int32)
        starts = ends - np.array([len(word) for word in words], np.int32)
        found = joined_duplicates(codes_of("".join(words)), starts, ends, np.array(sizes)).tolist()
        assert found == [gopher_repetition_filter.find_all_duplicate(words, size) for size in sizes]


def test_lines_by_hand() -> None:
    text = "A line that ends, and is longer than that.\nshort\n\nx = f(y)"
    found = scores(text)
    assert found["line_punct_ratio"] == 1 / 3
    assert found["short_line_ratio"] == 2 / 3
    assert found["newline_ratio"] == 3 / 13
    assert found["max_line_length"] == 42
    assert found["mean_line_length"] == (42 + 5 + 8) / 3
    assert found["alnum_ratio"] == sum(map(str.isalnum, text)) / len(text)


def test_chinese_words_are_characters_and_ngrams_span_two_each() -> None:
    found = scores("天下大势分久必合" * 2, "cjk", stop_words=("的",))
    assert (found["word_count"], found["mean_word_length"]) == (16, 1)
    assert found["top_2_gram"] == 2 * 4 / 16
    assert found["top_4_gram"] == 2 * 8 / 16
    assert found["dup_5_gram"] == 0  # no window of 10 characters is repeated without overlap


def test_c4_by_hand() -> None:
    page = "\n".join(
        [
            "A sentence of five words. And another one!",  # two sentences
            "Cited often and by many people.[3][citation needed]",  # one sentence, which ends before the citations
            "This line has no end",
            "Too short.",
            "Please enable Javascript to see this page.",
            "We use cookies to make this better.",
            "It trails off into the dark...",
            "Four words are here.",
        ]
    )
    assert scores(page, c4="reference")["c4_sentences"] == 3
    assert scores(page, c4="datatrove")["c4_sentences"] == 4
    assert scores(page, c4="paper")["c4_sentences"] == 3  # drops the line with citations, keeps the one about cookies
    assert scores(page, c4="fineweb")["c4_sentences"] == 6
    bracket = "No end of line and a { here\nAll is well in this line."
    assert scores(bracket, c4="reference")["c4_curly_bracket"] == 0
    assert scores(bracket, c4="paper")["c4_curly_bracket"] == 1
    assert scores("Here lorem ipsum dolor sit amet.")["c4_lorem_ipsum"] == 1


@pytest.mark.parametrize(
    ("line", "goes"),
    [
        ("THIS IS ALL SHOUTED OUT", True),
        ("This Is Not Shouted", False),
        ("12.345 / 67", True),
        ("3 likes", True),
        ("1.2k Views!", True),
        ("3 apples", False),
        ("Home", True),
        ("曹操", False),
        ("Sign-in to comment here", True),
        ("You sign-in to comment here", False),
        ("And now read more...", True),
        ("read more... of it in the next of our great books", False),
        ("There are three items in cart now and many more to come for all", True),
    ],
)
def test_refinedweb_lines_by_hand(line: str, goes: bool) -> None:
    kept = "an ordinary line of seven plain words"
    words = len(line.split())
    assert scores(f"{kept}\n{line}")["refinedweb_word_ratio"] == (words / (7 + words) if goes else 0)


def test_dropped_lines_have_spans_and_reasons() -> None:
    text = "A line of five words.\r\n \nMenu\nWe use cookies on this site.\n长江后浪推前浪，\n3 likes"
    scanner = Scanner(Definition(c4="reference"))
    found = scanner.dropped_lines(text, "c4")
    assert [(text[start:end], reason) for start, end, reason in found] == [
        ("Menu\n", "no_end"),
        ("We use cookies on this site.\n", "policy"),
        ("长江后浪推前浪，\n", "no_end"),
        ("3 likes", "no_end"),
    ]
    found = scanner.dropped_lines(text, "refinedweb")
    assert [(text[start:end], reason) for start, end, reason in found] == [
        ("Menu\n", "one_word"),
        ("3 likes", "counter"),
    ]


def test_bad_words_and_markers() -> None:
    english = {"bad_words": ("ass", "two words")}
    assert scores("An ass, two words. Assess the class ass", **english)["bad_words"] == 3
    assert scores("大傻瓜", bad_words=("傻瓜",), language="zh")["bad_words"] == 1
    header = "# Copyright 2020. Licensed.\n# Auto-generated, do not edit\n"
    found = scores(header + "x = 1\n" * 500 + "# do not edit")
    assert (found["generated_markers"], found["licence_markers"]) == (2, 2)


def test_lower_case_keeps_every_index() -> None:
    assert in_lower_case("İstanbul, GROß \U0001d400") == "İstanbul, groß \U0001d400"
    assert scores("İ JavaScript is on this long line.\nAnd this is one more line.")["c4_sentences"] == 1


def test_every_bound_has_a_score() -> None:
    meanings = {"use", "without", "splitter", "stop_words", "c4", "bad_words_file", "drop_lines"}
    judged_by_language = {"language_score", "language_share"}
    assert set(SCORES) == set(scores("some text"))
    assert set(RuleSet.model_fields) - meanings - judged_by_language == {*SCORES, *MODEL_SCORES}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Documents of the demo corpus, with code and Chinese, since nearly all English ones pass every rule."""
    found = []
    for name, count in (("english", 200), ("code", 150), ("chinese", 40)):
        with gzip.open(ROOT / f"data/demo/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            documents = [json.loads(line)["text"] for line in lines]
        found += [text[:6_000] for text in documents[:: max(1, len(documents) // count)]]
    return found


SENTENCE = re.compile(r"(?=.*\w).+?(?:[.?!…。？！．]+[\"')\]”’」』]*(?=\s|$)|[。？！．]+[\"')\]”’」』]*|$)", re.DOTALL)


@pytest.mark.parametrize(
    "use",
    [
        "gopher_quality@paper",
        "gopher_repetition@paper",
        "gopher_quality@datatrove",
        pytest.param("gopher_repetition@datatrove", marks=pytest.mark.full),
        "fineweb@datatrove",
        "c4@datatrove",
        pytest.param("c4@fineweb", marks=pytest.mark.full),
    ],
)
def test_verdicts_are_datatroves(use: str, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares verdicts on all documents with datatrove's filters when these count Trivium's words and sentences."""
    rules = RuleSet(use=(use,))
    for module in (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter):
        monkeypatch.setattr(module, "split_into_words", lambda text, language: _words(text, rules.splitter))
    scanner = Scanner(definition_of(rules))
    # Splitting into sentences is a documented difference: datatrove uses spaCy. Here both count our sentences.
    monkeypatch.setattr(c4_filters, "split_into_sentences", lambda line, language: [0] * int(_sentences(scanner, line)))
    theirs = {
        "gopher_quality@paper": gopher_quality_filter.GopherQualityFilter,
        "gopher_repetition@paper": gopher_repetition_filter.GopherRepetitionFilter,
        "gopher_quality@datatrove": gopher_quality_filter.GopherQualityFilter,
        "gopher_repetition@datatrove": gopher_repetition_filter.GopherRepetitionFilter,
        "fineweb@datatrove": fineweb_quality_filter.FineWebQualityFilter,
        "c4@datatrove": c4_filters.C4QualityFilter,
        "c4@fineweb": lambda: c4_filters.C4QualityFilter(filter_no_terminal_punct=False),
    }[use]()
    outcomes = []
    for text in texts:
        with np.errstate(all="ignore"):
            kept = theirs.filter(Document(text=text, id="x"))
        outcomes.append((verdict(scanner.scores(text), rules) == "", kept is True))
    assert [ours for ours, _ in outcomes] == [theirs for _, theirs in outcomes]
    assert 20 < sum(kept for kept, _ in outcomes) < len(outcomes) - 20  # both verdicts are well represented


def _words(text: str, splitter: str) -> list[str]:
    if splitter == "spaces":
        return text.split()
    return [text[start:end] for start, end in zip(*words_of(text), strict=True)]


def _sentences(scanner: Scanner, line: str) -> float:
    """Number of sentences of a line; the three words before it make sure that no rule drops the line."""
    return Scanner(Definition(c4="fineweb")).scores("a b c " + line)["c4_sentences"] if line.strip() else 0.0


def test_a_list_of_bad_words_is_read_once_it_is_as_the_message_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = RuleSet(bad_words=Bound(max=0), bad_words_file="words.txt")
    (tmp_path / "words.txt").write_bytes("Übel\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"bad_words_file words\.txt does not exist, seen from .*; correct the path$"):
        definition_of(rules)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"convert it to UTF-8$"):
        definition_of(rules)
    (tmp_path / "words.txt").write_text("Übel\n", encoding="utf-8")
    assert definition_of(rules).bad_words == ("übel",)
