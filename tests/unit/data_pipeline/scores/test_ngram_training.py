"""Tests n-gram models of token ids against modified Kneser-Ney written as its recursive formula over dictionaries."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from data_pipeline.scores.ngram_training import estimate

BOS, EOS, SIZE = 1, 2, 12


def documents(seed: int, count: int) -> list[np.ndarray]:
    """Returns documents of ids <s> tokens </s>, whose frequencies are very different; token 3 never occurs."""
    draw = np.random.default_rng(seed)
    share = np.array([2.0 ** -(id - 4) for id in range(4, SIZE)])
    lengths = draw.integers(1, 30, count)
    return [np.array([BOS, *draw.choice(np.arange(4, SIZE), n, p=share / share.sum()), EOS]) for n in lengths]


class KneserNey:
    """Interpolated modified Kneser-Ney (Chen and Goodman 1999), with counts in dictionaries of tuples."""

    def __init__(self, texts: Sequence[Sequence[int]], order: int) -> None:
        raw = [Counter(tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1)) for n in range(1, order + 1)]
        self.counts: list[dict[tuple, int]] = []
        for n in range(order):
            count = dict(raw[n])
            if n + 1 < order:
                before = Counter(longer[1:] for longer in raw[n + 1])
                begins = {tuple(t[: n + 1]) for t in texts} if n else set()
                count = {gram: number if gram in begins else before[gram] for gram, number in raw[n].items()}
            self.counts.append(count)
        self.discounts = [self._discounts(count) for count in self.counts]

    @staticmethod
    def _discounts(counts: dict[tuple, int]) -> list[float]:
        of = [sum(number == c for number in counts.values()) for c in range(5)]
        fallback = [0.0, 0.5, 1.0, 1.5]
        if not all(of[1:]):
            return fallback
        y = of[1] / (of[1] + 2 * of[2])
        found = [0.0, *(c - (c + 1) * y * of[c + 1] / of[c] for c in (1, 2, 3))]
        return found if all(0 < found[c] <= c for c in (1, 2, 3)) else fallback

    def probability(self, token: int, context: tuple[int, ...]) -> float:
        counts, discounts = self.counts[len(context)], self.discounts[len(context)]
        after = {gram[-1]: number for gram, number in counts.items() if gram[:-1] == context and number}
        lower = self.probability(token, context[1:]) if context else 1 / (SIZE - 1)
        if not after:
            return lower
        total, number = sum(after.values()), after.get(token, 0)
        left = sum(discounts[min(one, 3)] for one in after.values())
        return (number - discounts[min(number, 3)] + left * lower) / total


@pytest.mark.parametrize("order", [2, 3, 5])
def test_bits_are_those_of_the_formula(order: int) -> None:
    training, held_out = documents(0, 60), [*documents(1, 10), np.array([BOS, 3, 4, 3, 3, EOS])]
    reference = KneserNey([document.tolist() for document in training], order)
    ids = [0, *range(2, SIZE)]  # every id but <s>, which is never predicted
    for context in ((), (BOS,), (4,), (3,), (4, 5)[: order - 1]):
        assert sum(reference.probability(id, context) for id in ids) == pytest.approx(1)
    bits = -sum(
        math.log2(reference.probability(int(t[i]), tuple(t[max(0, i - order + 1) : i].tolist())))
        for t in held_out
        for i in range(1, len(t))
    )
    model = estimate(training, SIZE, BOS, EOS, order)
    assert model.bits(held_out) == pytest.approx(bits, rel=1e-6)


def test_text_that_was_seen_takes_few_bits() -> None:
    text = np.array([BOS, *np.random.default_rng(0).integers(4, SIZE, 400), EOS])
    model = estimate([text], SIZE, BOS, EOS, 5)
    assert model.bits([text]) < 0.5 * model.bits([np.array([BOS, *text[1:-1][::-1], EOS])])


def test_no_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one document"):
        estimate([], SIZE, BOS, EOS)
