"""Exact deduplication of lines or paragraphs: the first `max_copies` of each stay, all others are cut.

CCNet (Wenzek et al. 2020, arXiv 1911.00359) drops repeated paragraphs in this way; the limit on copies is that of Llama
3 (arXiv 2407.21783). Two lines are the same if they are equal without white space at both ends. Copies are ordered by
source, shard, row and line. They are counted by 128-bit BLAKE2b digests, on disk: see `copies`.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from datatrove.data import Document

from configs.cuts import LinesConfig
from data_pipeline.core.canary_naming import canary_of, source_of
from data_pipeline.cutting.copies import DIGEST, Quota, TextUnits
from data_pipeline.cutting.cuts import Cut, CutStep, byte_offsets

_PARAGRAPH_BREAK = re.compile(r"(\n[^\S\n]*\n\s*)")


class Lines(TextUnits):
    """Splits texts into lines or paragraphs, and selects those that are long enough to be deduplicated."""

    def __init__(self, settings: LinesConfig) -> None:
        self.settings = settings

    def units(self, text: str) -> tuple[list[str], list[int]]:
        """Splits a text; returns the units without the breaks between them, and each one's length with its break."""
        if self.settings.unit == "line":
            lines = text.split("\n")
            return lines, [len(line) + 1 for line in lines]
        parts = _PARAGRAPH_BREAK.split(text)  # units and breaks in turn
        breaks = [*parts[1::2], ""]
        return parts[::2], [len(unit) + len(between) for unit, between in zip(parts[::2], breaks, strict=True)]

    def counted(self, text: str, source: str, shard: str) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Returns the spans of the units that count, in characters with the break after each, and their DIGESTs."""
        settings = self.settings
        if settings.sources is not None and source_of(source) not in settings.sources:
            return [], np.zeros(0, DIGEST)
        # With scope "source", equal lines of different sources are different units; so are those of canaries.
        within = canary_of(shard) or (source if settings.scope == "source" else "")
        person = hashlib.blake2b(within.encode(), digest_size=16).digest() if within else b""
        spans, digests, start = [], [], 0
        for line, size in zip(*self.units(text), strict=True):
            line = line.strip()
            if len(line) >= settings.min_chars:
                spans.append((start, min(start + size, len(text))))
                digests.append(hashlib.blake2b(line.encode(), digest_size=16, person=person).digest())
            start += size
        return spans, np.frombuffer(b"".join(digests), DIGEST)

    def digests(self, text: str, source: str, shard: str) -> np.ndarray:
        return self.counted(text, source, shard)[1]


class CutLines(CutStep):
    """Step that cuts the copies of lines that a shard may not keep; `quotas` is the folder of quotas."""

    name = "Lines"

    def __init__(
        self, folder: str, tallies: str, select: str, settings: LinesConfig, quotas: str, shards: Sequence[str]
    ) -> None:
        super().__init__(folder, tallies, select)
        self.lines = Lines(settings)
        self.quotas = quotas
        self.shards = list(shards)
        self._quota: Quota | None = None

    def open_shard(self, shard: str) -> None:
        self._quota = Quota(self.quotas, self.shards.index(shard))

    def find(self, document: Document) -> tuple[list[Cut], dict[str, Any]]:
        assert self._quota is not None
        spans, digests = self.lines.counted(document.text, document.metadata["source"], document.metadata["shard"])
        indices = self._quota.indices(digests)
        chosen: list[int] = []
        for number in np.flatnonzero(indices >= 0).tolist():
            if self._quota.left[indices[number]] > 0:
                self._quota.left[indices[number]] -= 1
            else:
                chosen.extend(spans[number])
        offsets = byte_offsets(document.text, chosen)
        reason = f"duplicate_{self.lines.settings.unit}"
        return [Cut(start, end, "", reason) for start, end in zip(offsets[::2], offsets[1::2], strict=True)], {}
