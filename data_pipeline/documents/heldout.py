"""Which documents are held out: those whose hash of (seed, id) is low. No text, no tables.

So the split survives a change of filters, of order and of the number of workers, and a task that meets a document needs
to know no other one. Near-duplicates cannot sit on both sides: deduplication ran before, over all sources.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from data_pipeline.core.hashing import stable_hash

Drawn = tuple[float, str]  # what `draw` gives for an id, and the id


def draw(seed: int, document_id: str) -> float:
    """In [0, 1), a function of seed and id."""
    return stable_hash(f"{seed}\0{document_id}") / 2**64


@dataclass(frozen=True)
class Extremes:
    """The lowest and the highest drawn of some documents; None of none."""

    lowest: Drawn | None = None
    highest: Drawn | None = None

    @classmethod
    def of(cls, ids: Iterable[str], seed: int) -> "Extremes":
        drawn = [(draw(seed, document_id), document_id) for document_id in ids]
        return cls(min(drawn), max(drawn)) if drawn else cls()

    def __or__(self, other: "Extremes") -> "Extremes":
        """Of both together."""
        lows = [drawn for drawn in (self.lowest, other.lowest) if drawn]
        highs = [drawn for drawn in (self.highest, other.highest) if drawn]
        return Extremes(min(lows, default=None), max(highs, default=None))


@dataclass(frozen=True)
class HeldoutRule:
    """How the held-out documents of one source are told: those drawn under `share`, and never none or all of them.

    Of a share of 0, and of a source of fewer than two documents, there are none.
    """

    share: float
    seed: int
    always: str  # an id that is held out, "" for none
    never: str

    @classmethod
    def of(cls, found: Extremes, share: float, seed: int) -> "HeldoutRule":
        """`found` are those of all documents of the source."""
        if not share or found.lowest is None or found.highest is None or found.lowest == found.highest:
            return cls(0.0, seed, "", "")
        always = found.lowest[1] if found.lowest[0] >= share else ""
        never = found.highest[1] if found.highest[0] < share else ""
        return cls(share, seed, always, never)

    def holds_out(self, document_id: str) -> bool:
        if document_id and document_id in (self.always, self.never):
            return document_id == self.always
        return draw(self.seed, document_id) < self.share
