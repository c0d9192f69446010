"""Packing of documents into rows, by concatenation or best-fit, from the documents' lengths alone.

Both put every token of every document into one row, and neither reads tokens. `concat` puts documents end to end and
cuts every `seq_length` tokens: only the last row has padding, but documents are cut anywhere. `best_fit` cuts only
documents longer than a row, fills rows with whole pieces, and pads the rest (Ding et al., "Fewer Truncations Improve
Language Modeling", 2024, arXiv:2404.10830). `extra` reserves positions with each piece of a document, for the control
symbols that `fim` inserts; under `concat`, a row whose end has no room for them and one token is padded there. The
order of documents and rows is up to the caller (`epochs`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Packed:
    """Rows as segments in order: row r holds segments [offsets[r], offsets[r + 1]). All arrays are int64.

    Segment i is tokens [start[i], start[i] + length[i]) of document[i], an index into the lengths that were packed.
    Iteration yields each row's document indices.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for first, last in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            yield self.document[first:last].tolist()

    def take(self, rows: np.ndarray) -> "Packed":
        """Returns the rows with the given indices, in their order."""
        counts = np.diff(self.offsets)[rows]
        offsets = _offsets(counts)
        segments = np.repeat(self.offsets[rows] - offsets[:-1], counts) + np.arange(offsets[-1])
        return Packed(self.document[segments], self.start[segments], self.length[segments], offsets)

    def stats(self, lengths: np.ndarray, seq_length: int, extra: np.ndarray | int = 0) -> dict[str, Any]:
        """Returns the share of positions that are padding, of documents that are cut, and of those cut needlessly.

        A document is cut if it has more than one piece, and needlessly if it would fit in a row.
        """
        pieces = np.bincount(self.document, minlength=len(lengths))
        cut, fits = pieces > 1, np.asarray(lengths) + extra <= seq_length
        documents = max(1, int((pieces > 0).sum()))
        used = int(self.length.sum()) + int((pieces * extra).sum())
        return {
            "padding_share": 1 - used / max(1, len(self) * seq_length),
            "cut_share": int(cut.sum()) / documents,
            "needless_cut_share": int((cut & fits).sum()) / documents,
        }


def concat(lengths: Sequence[int] | np.ndarray, seq_length: int, extra: np.ndarray | int = 0) -> Packed:
    """Packs documents end to end in the given order; a row begins every `seq_length` positions."""
    lengths, extra = _checked(lengths, seq_length, extra)
    most = int((lengths // (seq_length - extra) + 2).sum())  # a first piece, whole rows, a last piece
    document, start, length, firsts = (np.empty(most, dtype=np.int64) for _ in range(4))
    segments, rows = _lay(lengths, extra, seq_length, document, start, length, firsts)
    offsets = np.append(firsts[:rows], segments)
    return Packed(document[:segments], start[:segments], length[:segments], offsets)


def best_fit(lengths: Sequence[int] | np.ndarray, seq_length: int, extra: np.ndarray | int = 0) -> Packed:
    """Packs by best-fit decreasing: the longest piece first, each into the row in which it leaves the least room.

    A document longer than a row gives whole rows and one shorter piece. If pieces are equally long, that of the
    earlier document comes first. Takes time in proportion to pieces * log(seq_length).
    """
    lengths, extra = _checked(lengths, seq_length, extra)
    room = seq_length - extra
    pieces = -(-lengths // room)
    first = _offsets(pieces)
    document = np.repeat(np.arange(len(lengths)), pieces)
    start = (np.arange(first[-1]) - first[:-1][document]) * room[document]
    length = np.minimum(lengths[document] - start, room[document])
    size = length + extra[document]
    order = np.argsort(-size, kind="stable")
    row_of = np.empty(len(order), dtype=np.int64)
    rows = _fill_rows(size[order], seq_length, row_of)
    by_row = np.argsort(row_of, kind="stable")  # keeps the order of filling within a row
    chosen = order[by_row]
    offsets = _offsets(np.bincount(row_of, minlength=rows))
    return Packed(document[chosen], start[chosen], length[chosen], offsets)


PACKINGS = {"concat": concat, "best_fit": best_fit}


def _checked(
    lengths: Sequence[int] | np.ndarray, seq_length: int, extra: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns lengths and extra positions as int64 [documents]; raises ValueError if they are invalid."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.ndim != 1 or (lengths < 0).any():
        raise ValueError("document lengths must be one list of numbers, none below 0")
    extra = np.broadcast_to(np.asarray(extra, dtype=np.int64), lengths.shape)
    if seq_length <= extra.max(initial=0):
        raise ValueError(
            f"seq_length = {seq_length}: a row needs room for at least one token beside {extra.max(initial=0)} symbols"
        )
    return lengths, extra


def _offsets(counts: np.ndarray) -> np.ndarray:
    """Returns the cumulative sum of `counts`, from 0, int64 [counts + 1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _compiled(function: Callable[..., T]) -> Callable[..., T]:
    """Compiles a function with numba when it is first called, since ranks that train import this module but never pack.

    Importing numba takes half a second of every process.
    """

    @functools.cache
    def compiled() -> Callable[..., T]:
        import numba

        machine_code: Callable[..., T] = numba.njit(cache=True)(function)
        return machine_code

    return functools.wraps(function)(lambda *arguments: compiled()(*arguments))


@_compiled
def _lay(
    lengths: np.ndarray,
    extra: np.ndarray,
    seq_length: int,
    document: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    firsts: np.ndarray,
) -> tuple[int, int]:
    """Fills the arrays with each segment and with each row's first segment; returns (segments, rows)."""
    segments = rows = room = 0
    for i in range(len(lengths)):
        at = 0
        while at < lengths[i]:
            if room <= extra[i]:
                firsts[rows] = segments
                rows += 1
                room = seq_length
            taken = min(lengths[i] - at, room - extra[i])
            document[segments], start[segments], length[segments] = i, at, taken
            segments += 1
            at += taken
            room -= taken + extra[i]
    return segments, rows


@_compiled
def _fill_rows(lengths: np.ndarray, seq_length: int, row_of: np.ndarray) -> int:
    """Assigns pieces, given by descending length, to rows; fills `row_of` and returns the number of rows.

    Rows with the same room left form a stack (`top`, `below`). A binary tree over rooms 0..seq_length, in which a node
    is set if any room below it has a row, finds the smallest sufficient room.
    """
    size = 1
    while size < seq_length + 1:
        size *= 2
    tree = np.zeros(2 * size, dtype=np.bool_)
    top = np.full(seq_length + 1, -1, dtype=np.int64)
    below = np.full(len(lengths), -1, dtype=np.int64)
    rows = 0
    for i in range(len(lengths)):
        length = lengths[i]
        node = size + length
        # Go up until a right sibling is set, then down from it, to the left where possible.
        if not tree[node]:
            while node > 1 and (node % 2 == 1 or not tree[node + 1]):
                node //= 2
            node = node + 1 if node > 1 else 0
            while 0 < node < size:
                node = 2 * node if tree[2 * node] else 2 * node + 1
        if node == 0:
            row, room = rows, seq_length
            rows += 1
        else:
            room = node - size
            row = top[room]
            top[room] = below[row]
            if top[room] < 0:
                tree[node] = False
                node //= 2
                while node >= 1 and not (tree[2 * node] or tree[2 * node + 1]):
                    tree[node] = False
                    node //= 2
        row_of[i] = row
        room -= length
        below[row] = top[room]
        top[room] = row
        node = size + room
        while node >= 1 and not tree[node]:
            tree[node] = True
            node //= 2
    return rows
