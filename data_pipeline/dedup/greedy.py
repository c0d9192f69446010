"""Which documents of a cluster stay: compiled code over the n-grams of one cluster at a time.

The documents of a cluster are gone through in order of priority, and each is dropped for the first document in this
order that is kept already and that it is a duplicate of; if there is none, it is kept. A document is a duplicate of
another if the two are equal for the exact comparison, have the same address (where addresses count), or have n-grams of
at least the given Jaccard similarity. These three are asked in this order. Nothing goes through a chain: a document
that is similar only to a dropped one is kept. Documents of earlier runs come first, and are kept whatever they are.

Kept documents are searched for a similar one in full while there are few. Otherwise an index names those that can be
similar enough: two sets, in one order of their members, can only be so if they share one of their first n - ceil(least
* n) + 1, and if what comes after the first common member leaves room for the others (prefix and position filters:
Bayardo et al. 2007, All-Pairs; Xiao et al. 2008, PPJoin). No similar document is missed, and the rarest members come
first in the order, so that a template which all documents share costs little. Equal documents are not compared at all.
"""

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np

KEPT = -1
_FEW = 24  # kept documents that are compared one by one
_COUNTERS_LOG = 24  # of the most counters, by which members are put in order; two may share one
_HAIR = 1e-9  # so that rounding never ends a comparison too early: then a few more are made, with the same outcome
Room = Callable[[int, type[np.generic]], np.ndarray]  # (entries, dtype) -> zeros, in memory or in a file


class ClusterNgrams(NamedTuple):
    """The documents of one cluster, in order of priority.

    `groups` int64 [documents]: documents that are equal for the exact comparison share a number from 0 on.
    `addresses` int64 [documents]: the same for addresses; -1 where there is none, or where addresses do not count.
    Both are below the number of documents.
    `earlier` bool [documents]: documents of earlier runs.
    `ends` int64 [groups]: where in `grams` the n-grams of each group end; uint64, ascending and distinct in a group.
    """

    groups: np.ndarray
    addresses: np.ndarray
    earlier: np.ndarray
    ends: np.ndarray
    grams: np.ndarray


class PrefixIndex(NamedTuple):
    """Members of the kept documents' sets: by slot the newest entry, from 1 on; by entry a member, which kept document
    it is of, its position in the order of that set, and the entry before it in the same slot.
    """

    counters: np.ndarray
    heads: np.ndarray
    keys: np.ndarray
    owners: np.ndarray
    positions: np.ndarray
    behind: np.ndarray


def survivors(cluster: ClusterNgrams, least: float, room: Room) -> np.ndarray:
    """int64 [documents], for each the position of the document that stays instead, KEPT if it stays itself."""
    sizes = np.diff(cluster.ends, prepend=0)
    indexed = len(sizes) > _FEW
    entries = int((sizes - np.ceil((least - _HAIR) * sizes).astype(np.int64) + 1).sum()) if indexed else 0
    counters = np.zeros(1 << min(len(cluster.grams).bit_length(), _COUNTERS_LOG) if indexed else 1, np.uint32)
    index = PrefixIndex(
        counters,
        room(1 << entries.bit_length(), np.int64),
        room(entries, np.uint64),
        room(entries, np.int64),
        room(entries, np.int64),
        room(entries, np.int64),
    )
    if indexed:
        _count(cluster.grams, counters)
    return _survivors(cluster, least, index)


def all_but_the_first(earlier: np.ndarray) -> np.ndarray:
    """What `survivors` gives where every two documents of a cluster are taken for duplicates."""
    return np.where(earlier | (np.arange(len(earlier)) == 0), KEPT, 0)


@numba.njit(cache=True)
def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Jaccard similarity of two ascending arrays without repetition."""
    common = _common(one, other, 0.0)
    return common / max(len(one) + len(other) - common, 1)


@numba.njit(cache=True)
def _common(one: np.ndarray, other: np.ndarray, needed: float) -> int:
    """How many values two ascending arrays have in common; -1 as soon as they cannot be `needed`."""
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
    """Whether `jaccard` is at least `least`, found out as early as possible; no set is similar to an empty one."""
    both = len(one) + len(other)
    needed = least / (1 + least) * both - _HAIR * both
    common = _common(one, other, needed)
    return common > 0 and common / (both - common) >= least


@numba.njit(cache=True)
def _can_be(one: int, other: int, least: float) -> bool:
    """Whether sets of these sizes can be similar enough."""
    return bool(min(one, other) >= (least - _HAIR) * max(one, other))


@numba.njit(cache=True)
def _count(grams: np.ndarray, counters: np.ndarray) -> None:
    for gram in grams:
        counters[gram & np.uint64(len(counters) - 1)] += 1


@numba.njit(cache=True)
def _rarest(grams: np.ndarray, least: float, counters: np.ndarray) -> np.ndarray:
    """The members of which a similar set has one, in the common order: by counter, then by value."""
    counts = np.empty(len(grams), np.int64)
    for position in range(len(grams)):
        counts[position] = counters[grams[position] & np.uint64(len(counters) - 1)]
    order = np.argsort(counts, kind="mergesort")
    return grams[order[: len(grams) - int(np.ceil((least - _HAIR) * len(grams))) + 1]]


@numba.njit(cache=True)
def _survivors(cluster: ClusterNgrams, least: float, index: PrefixIndex) -> np.ndarray:
    count = len(cluster.groups)
    causes = np.full(count, KEPT, np.int64)
    of_group = np.full(count, KEPT, np.int64)  # the document kept of each group
    of_address = np.full(count, KEPT, np.int64)
    like_group = np.full(count, KEPT, np.int64)  # the document that a member of the group was dropped for as similar
    kept = np.empty(count, np.int64)  # documents with n-grams, one a group
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
            prefix = _rarest(mine, least, index.counters) if indexed else mine[:0]
            if not cluster.earlier[document]:
                if indexed and held > _FEW:
                    cause = _look_up(cluster, mine, prefix, least, index, kept, seen, document)
                else:
                    cause = _compare_all(cluster, mine, least, kept[:held])
                like_group[group] = cause
            if cause == KEPT:
                entries = _enter(index, prefix, held, entries)
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
    group = cluster.groups[document]
    return cluster.grams[cluster.ends[group - 1] if group else 0 : cluster.ends[group]]


@numba.njit(cache=True)
def _compare_all(cluster: ClusterNgrams, mine: np.ndarray, least: float, kept: np.ndarray) -> int:
    """The first similar document of `kept`."""
    for other in kept:
        theirs = _grams_of(cluster, other)
        if _can_be(len(mine), len(theirs), least) and _similar(mine, theirs, least):
            return int(other)
    return KEPT


@numba.njit(cache=True)
def _look_up(
    cluster: ClusterNgrams, mine: np.ndarray, prefix: np.ndarray, least: float, index: PrefixIndex, kept: np.ndarray,
    seen: np.ndarray, document: int,
) -> int:  # fmt: skip
    """The first similar document of those that the index holds; `seen` says for whom each was last looked at."""
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
            # This is the first member that they share: all others come behind it in both.
            most = min(len(mine) - position, len(theirs) - its_position)
            room = most >= least / (1 + least) * (len(mine) + len(theirs)) - _HAIR * len(mine)
            if room and _can_be(len(mine), len(theirs), least) and _similar(mine, theirs, least):
                best = other
    return int(kept[best]) if best < len(kept) else KEPT


@numba.njit(cache=True)
def _enter(index: PrefixIndex, prefix: np.ndarray, owner: int, entries: int) -> int:
    """Puts a kept document into the index; returns how many entries that has then."""
    for position in range(len(prefix)):
        slot = prefix[position] & np.uint64(len(index.heads) - 1)
        index.keys[entries], index.owners[entries], index.positions[entries] = prefix[position], owner, position
        index.behind[entries] = index.heads[slot]
        entries += 1
        index.heads[slot] = entries
    return entries
