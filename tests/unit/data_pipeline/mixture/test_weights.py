"""Tests shares and the order of sources; compares UniMax with a level found by bisection."""

import numpy as np
import pytest

from data_pipeline.mixture.weights import apportion, mixture_shares, most_samples, take_turns, unimax_shares


@pytest.mark.parametrize("counts", [[5, 3, 2], [1, 1, 998], [0, 7], [333, 333, 334], [600, 250, 100, 49, 1]])
def test_every_prefix_is_near_the_weights(counts: list[int]) -> None:
    order = take_turns(np.array(counts) / sum(counts), sum(counts))
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    prefix = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    due = np.arange(1, len(order) + 1)[:, None] * np.array(counts) / len(order)
    # Each source is at most half a sample early or late, so a position is off by at most half the number of sources.
    assert np.abs(prefix - due).max() <= 0.5 + len(counts) / 2


@pytest.mark.parametrize("seed", range(5))
def test_more_samples_begin_with_fewer(seed: int) -> None:
    draw = np.random.default_rng(seed)
    shares = draw.dirichlet(np.full(int(draw.integers(1, 9)), 0.3))
    longest = take_turns(shares, 3000)
    for samples in [1, 2, 3, *draw.integers(4, 3000, size=20).tolist()]:
        order = take_turns(shares, samples)
        np.testing.assert_array_equal(order, longest[:samples])
        assert np.abs(np.bincount(order, minlength=len(shares)) - shares * samples).max() <= 1 + len(shares) / 2
    most = (shares * draw.uniform(100, 2000, size=len(shares))).astype(int)
    enough = most_samples(shares, most)
    assert (np.bincount(longest[:enough], minlength=len(shares)) <= most).all()
    assert (np.bincount(longest[: enough + 1], minlength=len(shares)) > most).any()


def test_shares() -> None:
    assert apportion([0.5, 0.3, 0.2], 11).tolist() == [6, 3, 2]
    assert apportion([1 / 3] * 3, 100).sum() == 100
    tokens = {"a": 100, "b": 400}
    assert mixture_shares(tokens, {"a": 3, "b": 1}, None) == {"a": 0.75, "b": 0.25}
    assert mixture_shares(tokens, None, 1.0) == pytest.approx({"a": 0.2, "b": 0.8})
    assert mixture_shares(tokens, None, 2.0) == pytest.approx({"a": 1 / 3, "b": 2 / 3})


def level(most: list[float], budget: float) -> list[float]:
    """Returns what each source gives by UniMax's definition: min(level, cap), at the level that spends the budget."""
    low, high = 0.0, budget
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(middle, cap) for cap in most) < budget else (low, middle)
    return [min(high, cap) for cap in most]


@pytest.mark.parametrize("seed", range(20))
def test_unimax_is_as_even_as_the_caps_allow(seed: int) -> None:
    draw = np.random.default_rng(seed)
    most = (10 ** draw.uniform(1, 6, size=int(draw.integers(1, 12)))).tolist()
    budget = float(draw.uniform(0.01, 1)) * sum(most)
    found = unimax_shares({str(n): cap for n, cap in enumerate(most)}, budget)
    assert list(found) == [str(n) for n in range(len(most))]
    np.testing.assert_allclose([share * budget for share in found.values()], level(most, budget), rtol=1e-9)


def test_unimax_is_uniform_without_caps_and_by_the_caps_above_the_budget() -> None:
    assert unimax_shares({"a": 1e9, "b": 1e9, "c": 1e10}, 100.0) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert unimax_shares({"a": 30, "b": 10}, 1000.0) == pytest.approx({"a": 0.75, "b": 0.25})
