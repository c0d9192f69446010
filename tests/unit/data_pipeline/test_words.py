"""Splitters and n-gram hashes."""

import itertools

import numpy as np
import pytest

from data_pipeline.words import Coded, ngram_hashes, split, split_plain, window


def test_splitters() -> None:
    assert split("Don't  stop,\nnow", "spaces") == ["Don't", "stop,", "now"]
    assert split("曹操用AI 3次。", "cjk") == ["曹", "操", "用", "AI", "3", "次", "。"]
    assert split_plain("曹操，AI。", "cjk") == ["曹", "操", "ai"]
    assert split_plain("Don't stop!", "spaces") == ["don", "t", "stop"]
    assert (window(5, "spaces"), window(5, "cjk")) == (5, 10)


@pytest.mark.parametrize("sizes", [(2, 3), (5,), (1, 4)])
def test_ngram_hashes_are_equal_exactly_where_ngrams_are(sizes: tuple[int, ...]) -> None:
    words = np.random.default_rng(0).choice(["a", "b", "ab", "c"], 200).tolist()
    coded = Coded.of(words)
    for hashes in (coded.local_hashes(), coded.stable_hashes({})):
        for size, found in ngram_hashes(hashes, sizes).items():
            grams = [tuple(words[place : place + size]) for place in range(len(words) - size + 1)]
            assert len(found) == len(grams)
            for (gram, value), (other, other_value) in itertools.combinations(zip(grams, found, strict=True), 2):
                assert (gram == other) == (value == other_value)


def test_too_few_words_give_no_ngrams() -> None:
    hashes = Coded.of(["a", "b"]).local_hashes()
    assert [len(found) for found in ngram_hashes(hashes, (2, 3, 9)).values()] == [1, 0, 0]


def test_stable_hashes_do_not_change() -> None:
    # The held-out split hangs on it: a change would mix held-out documents into training.
    assert Coded.of(["whale"]).stable_hashes({})[0] == 9810230503022157388
