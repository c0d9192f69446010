"""Cursors: how much of each source's epochs a chain of plans has used, so that the next plan can go on from there.

plan.json holds the cursors at the plan's beginning (`begins`). For an epoch that is partly used, index arrays hold the
pieces that are left. `rows.Plan.cursors` computes the cursors after some of the plan's samples; those of sources that a
plan does not use are carried along unchanged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.mixture.epochs import Pieces

PIECE_ARRAYS = ("document", "start", "length")


@dataclass(frozen=True)
class Cursor:
    """Position of one source: its epoch, counted from 0, and the pieces `left` of it; None if all of it is left.

    `stores` are the SHA-256 of the indexes of the token stores whose documents `left` refers to.
    """

    epoch: int
    left: Pieces | None
    stores: tuple[str, ...]

    def after(self, ended: int, used: Pieces, lengths: np.ndarray) -> "Cursor":
        """Returns the cursor after the end of `ended` more epochs and the use of the pieces `used` of the next one.

        `lengths` are the tokens of the source's documents.
        """
        left = self.left if not ended else None
        if len(used):
            left = (Pieces.whole(lengths) if left is None else left).without(used)
        return Cursor(self.epoch + ended, left, self.stores)

    def of_documents(self, lengths: np.ndarray) -> "Cursor":
        """Returns the cursor without pieces of documents of length 0, such as removed ones; skips an empty epoch."""
        left = self.left and self.left.take(lengths[self.left.document] > 0)
        if left is not None and not len(left):
            return Cursor(self.epoch + 1, None, self.stores)
        return Cursor(self.epoch, left, self.stores)

    def check(self, source: str, stores: tuple[str, ...]) -> None:
        """Raises ValueError if the source's token stores are not those that the cursor refers to."""
        if stores != self.stores:
            raise ValueError(
                f"source {source} has other token stores than when the earlier plan was made, so that the documents "
                "already used are unknown. Give new text a source name of its own, or build all plans again"
            )


def described(cursors: Mapping[str, Cursor]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns the description of cursors for plan.json, and their index arrays by file name."""
    arrays = {
        f"left.{source}.{name}.npy": getattr(cursor.left, name).astype(np.int64)
        for source, cursor in cursors.items()
        if cursor.left is not None
        for name in PIECE_ARRAYS
    }
    entries = {
        source: {"epoch": cursor.epoch, "partly_used": cursor.left is not None, "stores": list(cursor.stores)}
        for source, cursor in cursors.items()
    }
    return entries, arrays


def read(entries: Mapping[str, Any], array: Callable[[str], np.ndarray]) -> dict[str, Cursor]:
    """Returns the cursors from the description that `described` made; `array` opens an index array by file name."""
    return {
        source: Cursor(
            entry["epoch"],
            Pieces(*(array(f"left.{source}.{name}.npy") for name in PIECE_ARRAYS)) if entry["partly_used"] else None,
            tuple(entry["stores"]),
        )
        for source, entry in entries.items()
    }
