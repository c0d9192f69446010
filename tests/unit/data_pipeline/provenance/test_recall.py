"""Compares `similar_pairs` with a comparison of all pairs, on real text with copies of it."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from data_pipeline.dedup.greedy import jaccard
from data_pipeline.provenance.recall import CandidateDocuments, measure, similar_pairs, total
from data_pipeline.scan.minhash import shingles
from tests.demo_corpus import demo_records


@pytest.fixture(scope="module")
def grams() -> list[np.ndarray]:
    """Returns the n-grams of prose, of code, and of copies of both without every 31st, 13th or 7th word."""
    texts = [record["text"][:4000] for source in ("english", "code") for record in demo_records(source)[:60]]
    for every in (31, 13, 7):
        texts += [" ".join(word for n, word in enumerate(text.split()) if n % every) for text in texts[:120:4]]
    texts += [texts[3], "so now these are five words", "so now these are five words", "two words", "two words", ""]
    return [np.unique(shingles(text, 5)) for text in texts]


@pytest.mark.parametrize("least", [0.3, 0.5, 0.75, 0.8, 1.0])
def test_pairs_are_those_of_all_with_all(grams: Sequence[np.ndarray], least: float) -> None:
    expected = {
        (one, other): value
        for one, other in itertools.combinations(range(len(grams)), 2)
        if (value := jaccard(grams[one], grams[other])) >= least
    }
    pairs, similarity = similar_pairs(grams, least)
    assert dict(zip(map(tuple, pairs.tolist()), similarity.tolist(), strict=True)) == expected
    assert len(expected) >= (2 if least == 1.0 else 5)
    assert least == 1.0 or min(expected.values()) < 1.0


def test_a_similarity_that_is_just_the_threshold_counts() -> None:
    one, other = np.arange(10, dtype=np.uint64), np.arange(3, 10, dtype=np.uint64)  # 7 of 10
    assert similar_pairs([one, other], 0.7)[0].tolist() == [[0, 1]]
    assert not len(similar_pairs([one, other], 0.7 + 1e-6)[0])
    assert not len(similar_pairs([], 0.7)[0]) and not len(similar_pairs([one], 0.7)[0])


def test_recall_and_precision_are_counted_by_source() -> None:
    sources = ["a", "a", "a", "b", "b", "b"]
    sources.append("b")
    verdicts = ["", "near_duplicate", "", "", "near_duplicate", "url_duplicate", "exact_duplicate"]
    clusters = [0, 0, 2, 3, 3, 3, 3]
    documents = CandidateDocuments([str(n) for n in range(7)], sources, verdicts, clusters, [], {0: 0, 2: 2, 3: 3})
    pairs, similarity = np.array([[0, 1], [0, 2], [2, 3]]), np.array([0.9, 0.8, 0.85])
    found = measure(documents, pairs, similarity)
    a, b, across = (found.by_source[name] for name in ("a", "b", "across sources"))
    assert (a.pairs, a.missed, a.dropped, a.wrong, a.recall, a.precision) == (2, 1, 1, 0, 0.5, 1.0)
    assert (b.pairs, b.dropped, b.wrong, b.precision) == (0, 2, 1, 0.5) and np.isnan(b.recall)
    assert (across.pairs, across.missed) == (1, 1)
    assert found.missed == [(2, 3, 0.85), (0, 2, 0.8)] and found.wrong == [4]
    assert (total(found).pairs, total(found).missed, total(found).dropped) == (3, 2, 3)
