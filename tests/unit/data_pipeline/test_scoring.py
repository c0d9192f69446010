"""Scores against hand-computed numbers and against datatrove's own filters on real documents."""

import gzip
import json
from pathlib import Path

import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import gopher_quality_filter, gopher_repetition_filter

from configs.data import DataConfig, RuleSet
from configs.loader import load
from data_pipeline.filtering import verdict
from data_pipeline.scoring import scores

ROOT = Path(__file__).parents[3]
ENGLISH = RuleSet(stop_words=("the", "be", "to", "of", "and", "that", "have", "with"))


def test_quality_by_hand() -> None:
    found = scores("the cat -- of 12 # cats...\n- a bullet\nend…", ENGLISH)
    # words: the cat -- of 12 # cats... - a bullet end…  (11; 8 with a letter or digit, 7 with a letter)
    assert found["word_count"] == 8
    assert found["mean_word_length"] == (3 + 3 + 2 + 2 + 7 + 1 + 6 + 4) / 8
    assert found["hash_ratio"] == 1 / 11
    assert found["ellipsis_ratio"] == 2 / 11
    assert found["bullet_line_ratio"] == 1 / 3
    assert found["ellipsis_line_ratio"] == 2 / 3
    assert found["alpha_word_ratio"] == 7 / 11
    assert found["stop_word_count"] == 2


def test_repetition_by_hand() -> None:
    text = "one two\none two\n\none two\nsix"
    found = scores(text, ENGLISH)
    assert found["dup_line_ratio"] == 2 / 4
    assert found["dup_line_char_ratio"] == 14 / len(text)
    assert found["dup_para_ratio"] == 0
    assert found["top_2_gram"] == 3 * len("one two") / len(text)
    repeated = "a b c d e f a b c d e g"
    assert scores(repeated, ENGLISH)["dup_5_gram"] == 5 / len(repeated)  # "a b c d e", once again, without spaces
    assert scores(repeated, ENGLISH)["dup_6_gram"] == 0


def test_ngrams_do_not_join_words() -> None:
    assert scores("ab c d e f a bc d e f", ENGLISH)["dup_5_gram"] == 0


def test_the_earliest_ngram_wins_a_tie() -> None:
    assert scores("aa b cccc d", ENGLISH)["top_2_gram"] == len("aa b") / len("aa b cccc d")


def test_lines_by_hand() -> None:
    found = scores("A line that ends, and is longer than that.\nshort\n\nx = f(y)", ENGLISH)
    assert found["line_punct_ratio"] == 2 / 3
    assert found["short_line_ratio"] == 2 / 3
    assert found["newline_ratio"] == 3 / 13
    assert found["max_line_length"] == 42
    assert found["mean_line_length"] == (42 + 5 + 8) / 3


def test_chinese_words_are_characters_and_ngrams_span_two_each() -> None:
    rules = RuleSet(splitter="cjk", stop_words=("的",))
    text = "天下大势分久必合" * 2
    found = scores(text, rules)
    assert found["word_count"] == 16
    assert found["mean_word_length"] == 1
    assert found["top_2_gram"] == 2 * 4 / 16
    assert found["top_4_gram"] == 2 * 8 / 16
    assert found["dup_5_gram"] == 0  # a window of 10 characters fits the repetition nowhere


def test_every_bound_has_a_score() -> None:
    named = {name for name in RuleSet.model_fields if name not in ("splitter", "stop_words", "language_score")}
    assert named == set(scores("some text", ENGLISH))


@pytest.fixture(scope="module")
def demo_texts() -> list[str]:
    """Documents of the demo corpus, code among them: English ones alone pass nearly every rule."""
    texts = []
    for name, count in (("english", 300), ("code", 150)):
        with gzip.open(ROOT / f"data/demo/{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            documents = [json.loads(line)["text"] for line in lines]
        texts += [text[:6_000] for text in documents[:: max(1, len(documents) // count)]]
    return texts


def test_verdicts_equal_datatroves(demo_texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gopher_quality_filter, gopher_repetition_filter):
        monkeypatch.setattr(module, "split_into_words", lambda text, language: text.split())
    theirs = (gopher_quality_filter.GopherQualityFilter(), gopher_repetition_filter.GopherRepetitionFilter())
    preset = load(DataConfig, ROOT / "configs/data/demo.toml").rules["english"].bounds()
    quality_names = list(preset)[: list(preset).index("dup_line_ratio")]
    ours = [
        RuleSet(stop_words=ENGLISH.stop_words, **{name: preset[name] for name in names if name != "language_score"})
        for names in (quality_names, [name for name in preset if name not in quality_names])
    ]
    outcomes = []
    for text in demo_texts:
        found = scores(text, ENGLISH)
        for peer, rules in zip(theirs, ours, strict=True):
            kept = peer.filter(Document(text=text, id="x"))
            outcomes.append((kept is True, verdict(found, rules) == ""))
    assert [ours for _, ours in outcomes] == [theirs for theirs, _ in outcomes]
    assert 50 < sum(kept for kept, _ in outcomes) < len(outcomes) - 50  # both verdicts are well represented
