"""Tests which documents of a cluster stay: against the same rules in plain Python, and on difficult clusters."""

from collections.abc import Sequence

import numpy as np
import pytest

from data_pipeline.dedup import survivors as chooser
from data_pipeline.dedup.greedy import KEPT, ClusterNgrams, jaccard, survivors


def slowly(cluster: ClusterNgrams, least: float) -> list[int]:
    """Decides by the definition in the docstring of `greedy`, with Python sets."""
    sets = [set(part.tolist()) for part in np.split(cluster.grams, cluster.ends[:-1])]
    causes: list[int] = []
    for document, group in enumerate(cluster.groups.tolist()):
        kept = [other for other, cause in enumerate(causes) if cause == KEPT]
        mine = sets[group]
        equal = [other for other in kept if cluster.groups[other] == group]
        address = cluster.addresses[document]
        moved = [other for other in kept if address >= 0 and cluster.addresses[other] == address]
        theirs = {other: sets[cluster.groups[other]] for other in kept}
        near = [o for o in kept if mine and theirs[o] and len(mine & theirs[o]) / len(mine | theirs[o]) >= least]
        found = [*equal[:1], *moved[:1], *near[:1]]
        causes.append(KEPT if cluster.earlier[document] or not found else found[0])
    return causes


def cluster_of(
    sets: Sequence[set[int]],
    groups: Sequence[int] | None = None,
    addresses: Sequence[int] | None = None,
    earlier: Sequence[bool] | None = None,
) -> ClusterNgrams:
    count = len(sets) if groups is None else len(groups)
    grams = [np.array(sorted(one), np.uint64) for one in sets]
    return ClusterNgrams(
        np.arange(count) if groups is None else np.array(groups),
        np.full(count, -1) if addresses is None else np.array(addresses),
        np.zeros(count, bool) if earlier is None else np.array(earlier),
        np.cumsum([len(one) for one in grams]),
        np.concatenate([np.zeros(0, np.uint64), *grams]),
    )


def families(draw: np.random.Generator, count: int) -> list[set[int]]:
    """Draws random sets and edited copies of them and of copies; many share members, and a few are empty."""
    found: list[set[int]] = []
    for _ in range(count):
        one = set(draw.integers(0, 1 << 62, draw.integers(1, 40)).tolist()) | set(range(int(draw.integers(0, 30))))
        if found and draw.random() < 0.7:
            one = set(found[draw.integers(len(found))])
            for member in list(one)[: draw.integers(0, 6)]:
                one.remove(member)
                one.add(int(draw.integers(0, 1 << 62)))
        found.append(set() if draw.random() < 0.05 else one)
    return found


@pytest.mark.parametrize("least", [0.3, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("count", [3, 20, 140])  # up to 24 are compared one by one, more by the index
def test_survivors_are_those_of_the_definition(least: float, count: int) -> None:
    draw = np.random.default_rng([count, int(100 * least)])
    dropped = 0
    for _ in range(15):
        sets = families(draw, count)
        groups = draw.integers(0, count, count) if draw.random() < 0.5 else np.arange(count)
        groups = np.unique(groups, return_inverse=True)[1]
        addresses = np.where(draw.random(count) < 0.2, draw.integers(0, 3, count), -1)
        earlier = np.arange(count) < draw.integers(0, 3)
        cluster = cluster_of(sets[: int(groups.max()) + 1], groups.tolist(), addresses.tolist(), earlier.tolist())
        found = survivors(cluster, least, np.zeros).tolist()
        assert found == slowly(cluster, least)
        dropped += sum(cause != KEPT for cause in found)
    assert dropped > 5


def test_large_clusters_lie_in_files(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "_IN_MEMORY", 0)
    cluster = cluster_of(families(np.random.default_rng(9), 200))
    mapped = survivors(cluster, 0.75, lambda entries, dtype: chooser.zeros(str(tmp_path), "x", entries, dtype))
    assert mapped.tolist() == survivors(cluster, 0.75, np.zeros).tolist()
    assert len(list(tmp_path.glob("x-*.tmp"))) == 5


def test_nothing_goes_through_a_chain() -> None:
    """Makes windows that overlap by 90%: neighbours are similar (0.82), windows two apart are not (0.67)."""
    windows = [set(range(10 * n, 10 * n + 100)) for n in range(3000)]
    found = survivors(cluster_of(windows), 0.75, np.zeros).tolist()
    assert found == [KEPT if n % 2 == 0 else n - 1 for n in range(3000)]


def test_a_template_keeps_what_is_not_similar_enough() -> None:
    """Makes 2,000 documents of 60 common and 14 own n-grams, of similarity 60 / 88 = 0.68; then edited copies join."""
    template = [set(range(60)) | {1000 + 14 * n + m for m in range(14)} for n in range(2000)]
    assert (survivors(cluster_of(template), 0.75, np.zeros) == KEPT).all()
    assert survivors(cluster_of(template[:50]), 0.68, np.zeros).tolist() == [KEPT] + [0] * 49
    edited = [one - {5} for one in template]
    found = survivors(cluster_of([*template, *edited]), 0.75, np.zeros)
    assert (found[:2000] == KEPT).all() and found[2000:].tolist() == list(range(2000))


def test_thousands_of_copies_are_one_document() -> None:
    """Times thousands of copies: equal ones are not compared, and nearly equal ones with the kept one alone."""
    base = set(range(2000))
    near = [base | {10_000 + n} for n in range(3000)]
    assert survivors(cluster_of(near), 0.75, np.zeros).tolist() == [KEPT] + [0] * 2999
    equal = survivors(cluster_of([base], [0] * 200_000), 0.75, np.zeros)
    assert equal[0] == KEPT and not equal[1:].any()


def test_a_similarity_that_is_just_the_threshold_counts() -> None:
    for small, large in ((3, 4), (7, 10), (29, 40), (57, 100), (999, 1000)):
        sets = [set(range(large)), set(range(small))]
        crowd = [{10_000 * n, 10_000 * n + 1} for n in range(1, 40)]  # enough that the index is used
        for others in ([], crowd):
            cluster = cluster_of([*others, *sets])
            least = jaccard(*(np.array(sorted(one), np.uint64) for one in sets))
            assert survivors(cluster, least, np.zeros)[-1] == len(others)
            assert survivors(cluster, np.nextafter(least, 1), np.zeros)[-1] == KEPT
