"""Where a source's epochs stand when a plan ends, or is left after some of its samples: the next plan begins there.

A plan carries the cursors that it began with in plan.json (`begins`) and, of epochs that are partly used, the pieces
that are left in index arrays; `rows.Plan.cursors` moves them on. Sources that a plan lets rest keep theirs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.mixture.epochs import Pieces

PIECE_ARRAYS = ("document", "start", "length")


@dataclass(frozen=True)
class Cursor:
    """`epoch`, from 0, of which `left` is not used yet (None: nothing is).

    `stores` are the sha256 of the indexes of the token stores by whose documents `left` counts.
    """

    epoch: int
    left: Pieces | None
    stores: tuple[str, ...]

    def after(self, ended: int, used: Pieces, lengths: np.ndarray) -> "Cursor":
        """Past the end of so many epochs and, in the one after them, past the pieces `used`.

        `lengths` are the tokens of the source's documents.
        """
        left = self.left if not ended else None
        if len(used):
            left = (Pieces.whole(lengths) if left is None else left).without(used)
        return Cursor(self.epoch + ended, left, self.stores)

    def of_documents(self, lengths: np.ndarray) -> "Cursor":
        """Without what is left of documents that have no tokens (any more); past an epoch of which nothing else is."""
        left = self.left and self.left.take(lengths[self.left.document] > 0)
        if left is not None and not len(left):
            return Cursor(self.epoch + 1, None, self.stores)
        return Cursor(self.epoch, left, self.stores)

    def check(self, source: str, stores: tuple[str, ...]) -> None:
        """Errors: ValueError where the source has other token stores by now."""
        if stores != self.stores:
            raise ValueError(
                f"source {source} has other token stores than when the earlier plan was made: which of its documents "
                "are used cannot be told. Give new text a source name of its own, or build all plans again"
            )


def described(cursors: Mapping[str, Cursor]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What plan.json says of them, and index arrays by file name."""
    arrays = {
        f"left.{source}.{name}.npy": getattr(cursor.left, name).astype(np.int64)
        for source, cursor in cursors.items()
        if cursor.left is not None
        for name in PIECE_ARRAYS
    }
    told = {
        source: {"epoch": cursor.epoch, "partly_used": cursor.left is not None, "stores": list(cursor.stores)}
        for source, cursor in cursors.items()
    }
    return told, arrays


def read(told: Mapping[str, Any], array: Callable[[str], np.ndarray]) -> dict[str, Cursor]:
    """The opposite of `described`; `array` opens a file by name."""
    return {
        source: Cursor(
            entry["epoch"],
            Pieces(*(array(f"left.{source}.{name}.npy") for name in PIECE_ARRAYS)) if entry["partly_used"] else None,
            tuple(entry["stores"]),
        )
        for source, entry in told.items()
    }
