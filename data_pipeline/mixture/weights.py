"""Shares of the sources in a mixture's samples, and the order in which sources take turns.

Shares are given, by temperature (tokens ** (1 / temperature)), or by UniMax (Chung et al., "UniMax: Fairer and more
Effective Language Sampling for Large-Scale Multilingual Pretraining", 2023, arXiv:2304.09151), which makes them as even
as caps on each source's epochs allow. Weights learnt from a proxy model's loss are not supported.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def mixture_shares(
    tokens: Mapping[str, int], weights: Mapping[str, float] | None, temperature: float | None
) -> dict[str, float]:
    """Returns shares by source that sum to one; a temperature above 1 makes them more even than the sizes."""
    if weights is not None:
        raw = dict(weights)
    else:
        raw = {name: float(size) ** (1 / temperature) for name, size in tokens.items()} if temperature else {}
    bad = [name for name, value in raw.items() if not value > 0]
    if bad:
        raise ValueError(f"source {bad[0]} has weight {raw[bad[0]]}, expected above 0; leave it out of the mixture")
    total = sum(raw.values())
    return {name: raw[name] / total for name in tokens}


def unimax_shares(most: Mapping[str, float], budget: float) -> dict[str, float]:
    """Returns shares by source that sum to one, by algorithm 1 of the paper.

    `most` is the cap on each source, its size times its epochs, in the unit of `budget`. Sources are served from the
    smallest cap on: each gets an even share of the budget that is left, or its cap if that is smaller. If all caps
    together are below the budget, the shares are in proportion to the caps; the caller must refuse such a budget.
    """
    given: dict[str, float] = {}
    left = float(budget)
    for done, name in enumerate(sorted(most, key=lambda name: most[name])):
        given[name] = min(left / (len(most) - done), float(most[name]))
        left -= given[name]
    total = sum(given.values())
    return {name: given[name] / total for name in most}


def apportion(shares: Iterable[float], samples: int) -> np.ndarray:
    """Rounds shares * samples to whole numbers that sum to `samples`, by the method of largest remainders."""
    exact = np.array(list(shares), dtype=np.float64) * samples
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - counts), kind="stable")
    counts[largest[: samples - int(counts.sum())]] += 1
    return counts


def take_turns(shares: Sequence[float], samples: int) -> np.ndarray:
    """Returns the index of each sample's source; sources are spread evenly.

    Row k of a source, counted from 0, falls at time (k + 1/2) / share, and the first `samples` rows are taken. Each
    source thus gets its share by Webster's method of apportionment. Times do not depend on `samples`, so that a longer
    sequence of the same shares begins with the shorter one.
    """
    # There are at least `samples` rows before time `samples` plus half a sample for each source.
    last = samples + len(shares) / 2
    counts = [int(share * last + 0.5) + 1 if share else 0 for share in shares]
    source = np.repeat(np.arange(len(counts)), counts)
    times = np.concatenate([(np.arange(n) + 0.5) / share for n, share in zip(counts, shares, strict=True) if n])
    return source[np.lexsort((source, times))[:samples]]


def most_samples(shares: Sequence[float], most: Sequence[int]) -> int:
    """Returns the largest number of samples for which `take_turns` gives each source at most its rows in `most`."""
    end = min(
        (rows + 0.5) / share for share, rows in zip(shares, most, strict=True)
    )  # time of the first row beyond a cap

    def before(share: float) -> int:
        """Returns the number of rows of a source before time `end`."""
        rows = math.ceil(share * end - 0.5)
        while rows and (rows - 0.5) / share >= end:
            rows -= 1
        return rows

    return sum(before(share) for share in shares)


def running_counts(sources: np.ndarray) -> np.ndarray:
    """Returns the number of earlier samples with the same source for each sample; this is its row in that source."""
    rows = np.empty(len(sources), dtype=np.int64)
    for number in np.unique(sources):
        indices = np.flatnonzero(sources == number)
        rows[indices] = np.arange(len(indices))
    return rows
