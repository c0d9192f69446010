"""Decides which documents of a cluster stay, in compiled code over the n-grams of one cluster at a time.

A greedy pass visits the documents of a cluster in order of priority. A document is dropped if it is a duplicate of one
that is already kept; otherwise it is kept. Two documents are duplicates if they are equal for the exact comparison,
have the same address (where addresses count), or have n-grams of at least the given Jaccard similarity. The three tests
are made in this order, each against all kept documents, and the first kept one that passes is what the document is
dropped for. A document that is similar only to a dropped one is kept. Documents of earlier runs come first, and are
always kept.

While few documents are kept, each is compared. With more, an index finds those that can be similar enough. If all sets
are sorted in one common order, two sets can only be that similar if they share one of their first
n - ceil(least * n) + 1 members (n being a set's size), and if enough members follow the first common one in both
(prefix and position filters: Bayardo et al. 2007, All-Pairs; Xiao et al. 2008, PPJoin). No similar document is missed.
The rarest members come first in the common order, so that a template which all documents share costs little. Equal
documents are not compared at all.
"""

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np

KEPT = -1
_FEW = 24  # up to so many kept documents are compared one by one
_COUNTERS_LOG = 24  # log2 of the most counters of members, which set the common order; two members may share one
_MARGIN = 1e-9  # makes filters slightly too lenient, so that rounding never drops a pair that is similar enough
Allocate = Callable[[int, type[np.generic]], np.ndarray]  # (entries, dtype) -> zeros, in memory or in a file


class ClusterNgrams(NamedTuple):
    """The documents of one cluster, in order of priority, and their n-grams.

    `groups` int64 [documents]: a number from 0 on, the same for documents that are equal for the exact comparison.
    `addresses` int64 [documents]: a number from 0 on, the same for documents with the same address; -1 for a document
    without an address, or where addresses do not count. Both are below the number of documents.
    `earlier` bool [documents]: whether the document is of an earlier run.
    `ends` int64 [groups]: where in `grams` the n-grams of each group end.
    `grams` uint64: n-gram hashes, ascending and distinct within a group.
    """

    groups: np.ndarray
    addresses: np.ndarray
    earlier: np.ndarray
    ends: np.ndarray
    grams: np.ndarray


class PrefixIndex(NamedTuple):
    """Hash table with chaining that finds the kept documents whose prefixes hold a given member.

    `counters` uint32: how often the members that share a counter occur in the cluster. `heads` int64 [slots]: the
    newest entry of each slot, counted from 1, or 0. For each entry: `keys` the member, `owners` the index of the kept
    document, `positions` the member's position in that document's prefix, `behind` the previous entry of the slot.
    """

    counters: np.ndarray
    heads: np.ndarray
    keys: np.ndarray
    owners: np.ndarray
    positions: np.ndarray
    behind: np.ndarray


def survivors(cluster: ClusterNgrams, least: float, allocate: Allocate) -> np.ndarray:
    """Returns int64 [documents]: KEPT for a document that stays, else the position of the one it is dropped for.

    `least` is the Jaccard similarity from which on documents are duplicates.
    """
    sizes = np.diff(cluster.ends, prepend=0)
    indexed = len(sizes) > _FEW
    entries = int((sizes - np.ceil((least - _MARGIN) * sizes).astype(np.int64) + 1).sum()) if indexed else 0
    counters = np.zeros(1 << min(len(cluster.grams).bit_length(), _COUNTERS_LOG) if indexed else 1, np.uint32)
    index = PrefixIndex(
        counters,
        allocate(1 << entries.bit_length(), np.int64),
        allocate(entries, np.uint64),
        allocate(entries, np.int64),
        allocate(entries, np.int64),
        allocate(entries, np.int64),
    )
    if indexed:
        _count(cluster.grams, counters)
    return _survivors(cluster, least, index)


def all_but_the_first(earlier: np.ndarray) -> np.ndarray:
    """Returns what `survivors` would if all documents of a cluster were duplicates: the first and earlier ones stay."""
    return np.where(earlier | (np.arange(len(earlier)) == 0), KEPT, 0)


@numba.njit(cache=True)
def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two sets, given as ascending arrays of distinct values."""
    common = _common(one, other, 0.0)
    return common / max(len(one) + len(other) - common, 1)


@numba.njit(cache=True)
def _common(one: np.ndarray, other: np.ndarray, needed: float) -> int:
    """Counts the values that two ascending arrays share; -1 as soon as there cannot be `needed` of them."""
    common = i = j = 0
    while i < len(one) and j < len(other):
        if common + min(len(one) - i, len(other) - j) < needed:
            return -1
        if one[i] == other[j]:
            common += 1
            i += 1
            j += 1
        elif one[i] < other[j]:
            i += 1
        else:
            j += 1
    return common


@numba.njit(cache=True)
def _similar(one: np.ndarray, other: np.ndarray, least: float) -> bool:
    """Whether `jaccard` is at least `least`; stops as early as possible. An empty set is similar to no other."""
    both = len(one) + len(other)
    needed = least / (1 + least) * both - _MARGIN * both
    common = _common(one, other, needed)
    return common > 0 and common / (both - common) >= least


@numba.njit(cache=True)
def _sizes_allow(one: int, other: int, least: float) -> bool:
    """Whether the sizes of two sets allow a Jaccard similarity of at least `least`."""
    return bool(min(one, other) >= (least - _MARGIN) * max(one, other))


@numba.njit(cache=True)
def _count(grams: np.ndarray, counters: np.ndarray) -> None:
    """Counts how often members occur, in counters that they are hashed to."""
    for gram in grams:
        counters[gram & np.uint64(len(counters) - 1)] += 1


@numba.njit(cache=True)
def _prefix(grams: np.ndarray, least: float, counters: np.ndarray) -> np.ndarray:
    """Returns a set's first members in the common order (rarest first): any similar set has one of them as well."""
    counts = np.empty(len(grams), np.int64)
    for position in range(len(grams)):
        counts[position] = counters[grams[position] & np.uint64(len(counters) - 1)]
    order = np.argsort(counts, kind="mergesort")
    return grams[order[: len(grams) - int(np.ceil((least - _MARGIN) * len(grams))) + 1]]


@numba.njit(cache=True)
def _survivors(cluster: ClusterNgrams, least: float, index: PrefixIndex) -> np.ndarray:
    """Makes the greedy pass of `survivors`; if `index` has no entries, all kept documents are compared."""
    count = len(cluster.groups)
    causes = np.full(count, KEPT, np.int64)
    of_group = np.full(count, KEPT, np.int64)  # the kept document of each group
    of_address = np.full(count, KEPT, np.int64)
    like_group = np.full(count, KEPT, np.int64)  # the similar document that a member of the group was dropped for
    kept = np.empty(count, np.int64)  # kept documents with n-grams, one per group
    seen = np.full(count, -1, np.int64)
    indexed, held, entries = len(index.keys) > 0, 0, 0
    for document in range(count):
        group, address = cluster.groups[document], cluster.addresses[document]
        first = cluster.ends[group - 1] if group else 0
        mine = cluster.grams[first : cluster.ends[group]]
        cause = KEPT
        if not cluster.earlier[document]:
            cause = of_group[group]
            if cause == KEPT and address >= 0:
                cause = of_address[address]
            if cause == KEPT:
                cause = like_group[group]
        if cause == KEPT and of_group[group] == KEPT and len(mine):
            prefix = _prefix(mine, least, index.counters) if indexed else mine[:0]
            if not cluster.earlier[document]:
                if indexed and held > _FEW:
                    cause = _look_up(cluster, mine, prefix, least, index, kept, seen, document)
                else:
                    cause = _compare_all(cluster, mine, least, kept[:held])
                like_group[group] = cause
            if cause == KEPT:
                entries = _add_to_index(index, prefix, held, entries)
                kept[held] = document
                held += 1
        causes[document] = cause
        if cause == KEPT:
            if of_group[group] == KEPT:
                of_group[group] = document
            if address >= 0 and of_address[address] == KEPT:
                of_address[address] = document
    return causes


@numba.njit(cache=True)
def _grams_of(cluster: ClusterNgrams, document: int) -> np.ndarray:
    """N-grams of a document."""
    group = cluster.groups[document]
    return cluster.grams[cluster.ends[group - 1] if group else 0 : cluster.ends[group]]


@numba.njit(cache=True)
def _compare_all(cluster: ClusterNgrams, mine: np.ndarray, least: float, kept: np.ndarray) -> int:
    """Returns the first document of `kept` that is similar enough, else KEPT."""
    for other in kept:
        theirs = _grams_of(cluster, other)
        if _sizes_allow(len(mine), len(theirs), least) and _similar(mine, theirs, least):
            return int(other)
    return KEPT


@numba.njit(cache=True)
def _look_up(
    cluster: ClusterNgrams, mine: np.ndarray, prefix: np.ndarray, least: float, index: PrefixIndex, kept: np.ndarray,
    seen: np.ndarray, document: int,
) -> int:  # fmt: skip
    """Returns the first document in the index that is similar enough, else KEPT.

    `seen` holds, for each kept document, the last document that it was compared with.
    """
    best = len(kept)
    for position in range(len(prefix)):
        entry = index.heads[prefix[position] & np.uint64(len(index.heads) - 1)]
        while entry:
            key, other, its_position = index.keys[entry - 1], index.owners[entry - 1], index.positions[entry - 1]
            entry = index.behind[entry - 1]
            if key != prefix[position] or seen[other] == document:
                continue
            seen[other] = document
            if other > best:
                continue
            theirs = _grams_of(cluster, kept[other])
            # This is the first member that both share in the common order: all others come after it in both.
            most = min(len(mine) - position, len(theirs) - its_position)
            enough = most >= least / (1 + least) * (len(mine) + len(theirs)) - _MARGIN * len(mine)
            if enough and _sizes_allow(len(mine), len(theirs), least) and _similar(mine, theirs, least):
                best = other
    return int(kept[best]) if best < len(kept) else KEPT


@numba.njit(cache=True)
def _add_to_index(index: PrefixIndex, prefix: np.ndarray, owner: int, entries: int) -> int:
    """Adds a kept document's prefix to the index; returns the new number of entries."""
    for position in range(len(prefix)):
        slot = prefix[position] & np.uint64(len(index.heads) - 1)
        index.keys[entries], index.owners[entries], index.positions[entries] = prefix[position], owner, position
        index.behind[entries] = index.heads[slot]
        entries += 1
        index.heads[slot] = entries
    return entries
