"""The PII stage: replaces personal data, keys and tokens, or drops the document, depending on the kind.

`personal_data` describes what is found and what is not. The stage publishes the spans and kinds of what it found,
never the text: none of its tables, samples and logs holds it.
"""

from collections import Counter
from typing import Any

from datatrove.data import Document

from configs.cuts import PiiConfig
from data_pipeline.cutting.cuts import Cut, CutStep, byte_offsets
from data_pipeline.personal_data.find import PLACEHOLDERS, find


class RemovePii(CutStep):
    """Step that cuts kinds to be replaced, with a placeholder, and drops documents with other kinds as `pii_<kind>`."""

    name = "PII"

    def __init__(self, folder: str, tallies: str, select: str, settings: PiiConfig) -> None:
        super().__init__(folder, tallies, select)
        self.settings = settings

    def find(self, document: Document) -> tuple[list[Cut], dict[str, Any]]:
        settings = self.settings
        found = find(document.text, settings.actions, settings.private_ips)
        counts = Counter(kind for _, _, kind in found)
        columns: dict[str, Any] = {kind: counts[kind] for kind in sorted(settings.actions)}
        for kind in sorted(counts):
            if settings.actions[kind] == "drop_document":
                return [], columns | {"verdict": f"pii_{kind}"}
        texts = PLACEHOLDERS | settings.replacements
        positions = byte_offsets(document.text, [position for start, end, _ in found for position in (start, end)])
        spans = zip(positions[::2], positions[1::2], found, strict=True)
        return [Cut(start, end, texts[kind], f"pii_{kind}") for start, end, (_, _, kind) in spans], columns
