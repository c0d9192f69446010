"""Choice of the held-out documents: those whose hash of (seed, id) is below a threshold.

The split therefore stays the same when filters, order or the number of workers change, and a task decides for one
document without knowing the others. Near-duplicates cannot end up in both splits, since deduplication over all sources
runs before.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from data_pipeline.core.hashing import draw

Drawn = tuple[float, str]  # `draw` of an id, and the id


@dataclass(frozen=True)
class Extremes:
    """The ids of a set that `draw` gives the lowest and the highest number; None for an empty set."""

    lowest: Drawn | None = None
    highest: Drawn | None = None

    @classmethod
    def of(cls, ids: Iterable[str], seed: int) -> "Extremes":
        """Draws a number for every id and keeps the ids with the lowest and the highest."""
        drawn = [(draw(seed, document_id), document_id) for document_id in ids]
        return cls(min(drawn), max(drawn)) if drawn else cls()

    def __or__(self, other: "Extremes") -> "Extremes":
        """Returns the extremes of the union of both sets."""
        lows = [drawn for drawn in (self.lowest, other.lowest) if drawn]
        highs = [drawn for drawn in (self.highest, other.highest) if drawn]
        return Extremes(min(lows, default=None), max(highs, default=None))


@dataclass(frozen=True)
class HeldoutRule:
    """Rule that chooses a source's held-out documents: those whose draw is below `share`, but never none or all.

    No document is held out if the share is 0 or the source has fewer than two documents.
    """

    share: float
    seed: int
    always: str  # id that is held out in any case, "" for none
    never: str  # id that is never held out, "" for none

    @classmethod
    def of(cls, found: Extremes, share: float, seed: int) -> "HeldoutRule":
        """Makes the rule of a source; `found` are the extremes of all its documents."""
        if not share or found.lowest is None or found.highest is None or found.lowest == found.highest:
            return cls(0.0, seed, "", "")
        always = found.lowest[1] if found.lowest[0] >= share else ""
        never = found.highest[1] if found.highest[0] < share else ""
        return cls(share, seed, always, never)

    def holds_out(self, document_id: str) -> bool:
        """Whether the document is held out."""
        if document_id and document_id in (self.always, self.never):
            return document_id == self.always
        return draw(self.seed, document_id) < self.share
