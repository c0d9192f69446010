"""What share of the samples each source gets, and in which order sources take turns. Numbers alone, no files.

Shares are static, by temperature (tokens ** (1 / temperature)) or UniMax (Chung et al., "UniMax: Fairer and more
Effective Language Sampling for Large-Scale Multilingual Pretraining", 2023, arXiv:2304.09151): as even as caps on
each source's epochs allow. Left out: weights learnt from a proxy model's loss.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def mixture_shares(
    tokens: Mapping[str, int], weights: Mapping[str, float] | None, temperature: float | None
) -> dict[str, float]:
    """Shares by source, summing to one; a temperature above 1 evens out the sources' sizes."""
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
    """Shares by source, summing to one: algorithm 1 of the paper.

    `most` is what each source may give, its size times its epochs, in the unit of `budget`. From the smallest on, each
    source gets an even share of the budget that is left, or all that it may give if that is less. Where all together
    may give less than the budget, shares are of what they may give: the caller has to refuse such a budget.
    """
    given: dict[str, float] = {}
    left = float(budget)
    for done, name in enumerate(sorted(most, key=lambda name: most[name])):
        given[name] = min(left / (len(most) - done), float(most[name]))
        left -= given[name]
    total = sum(given.values())
    return {name: given[name] / total for name in most}


def apportion(shares: Iterable[float], samples: int) -> np.ndarray:
    """Whole numbers nearest to shares * samples that sum to `samples` (largest remainders)."""
    exact = np.array(list(shares), dtype=np.float64) * samples
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(-(exact - counts), kind="stable")
    counts[largest[: samples - int(counts.sum())]] += 1
    return counts


def take_turns(shares: Sequence[float], samples: int) -> np.ndarray:
    """Source of each sample, evenly spread: the k-th row of a source, from 0, falls at time (k + 1/2) / share.

    The first `samples` of them are taken, so each source gets its share by Webster's method of apportionment. Times do
    not depend on `samples`: more samples of the same shares begin with fewer ones.
    """
    # Up to time `samples` + half a sample for each source there are rows enough.
    last = samples + len(shares) / 2
    counts = [int(share * last + 0.5) + 1 if share else 0 for share in shares]
    source = np.repeat(np.arange(len(counts)), counts)
    times = np.concatenate([(np.arange(n) + 0.5) / share for n, share in zip(counts, shares, strict=True) if n])
    return source[np.lexsort((source, times))[:samples]]


def most_samples(shares: Sequence[float], most: Sequence[int]) -> int:
    """The largest number of samples of which `take_turns` gives no source more rows than `most` says."""
    end = min((rows + 0.5) / share for share, rows in zip(shares, most, strict=True))  # the first row too many

    def before(share: float) -> int:
        rows = math.ceil(share * end - 0.5)
        while rows and (rows - 0.5) / share >= end:
            rows -= 1
        return rows

    return sum(before(share) for share in shares)


def running_counts(sources: np.ndarray) -> np.ndarray:
    """How many earlier samples have the same source: the row, in its source, of each sample."""
    rows = np.empty(len(sources), dtype=np.int64)
    for number in np.unique(sources):
        indices = np.flatnonzero(sources == number)
        rows[indices] = np.arange(len(indices))
    return rows
