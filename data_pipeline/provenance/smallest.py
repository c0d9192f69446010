"""A random sample of rows that is the same each time: the rows with the smallest hashes of their ids."""

import heapq
from typing import Any

from data_pipeline.core.hashing import stable_hash

Row = dict[str, Any]  # of a table or a file of samples; has at least source and id


class Smallest:
    """Keeps the `count` rows with the smallest hashes of seed, source and id among all rows offered.

    The order in which rows are offered does not matter, except among rows of the same source and id.
    """

    def __init__(self, count: int, seed: str = "") -> None:
        self._count = count
        self._seed = seed
        self._heap: list[tuple[int, int, Row]] = []  # (-hash, -number of the offer, row): the largest hash is on top
        self._offered = 0

    def offer(self, row: Row) -> None:
        """Takes `row` into the sample if its hash is small enough, and drops the row with the largest hash."""
        self._offered += 1
        entry = (-stable_hash(f"{self._seed}\0{row['source']}\0{row['id']}"), -self._offered, row)
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, entry)
        elif entry[:2] > self._heap[0][:2]:
            heapq.heapreplace(self._heap, entry)

    def rows(self) -> list[Row]:
        """Returns the sample, the smallest hash first."""
        return [row for _, _, row in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1]))]
