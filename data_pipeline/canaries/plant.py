"""Canaries: documents with a known fate, planted in a run's input; `alarms` looks for them when it has ended.

Planted behind the readers, each is extracted, scored, filtered, deduplicated and cut as a document of its source is,
by the same tasks and rules, in shards of its own (`naming`), up to the documents stage, which leaves it out. What is
not tested so: reading of files, meeting documents of the sources, tokenizer and plan.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from configs.canaries import CanaryConfig
from data_pipeline.canaries.naming import canaries_of
from data_pipeline.core.ledger import Tally

FATES = "canaries.jsonl"  # in the documents stage's folder: id, and bytes cut by reason, of those that came that far
LEFT_OUT = "canary"  # why the documents stage drops a canary that nothing caught


def numbered(canaries: Mapping[str, CanaryConfig]) -> dict[str, tuple[int, CanaryConfig]]:
    """Name -> a number, by which its shard is named, and the canary."""
    return {name: (number, canaries[name]) for number, name in enumerate(sorted(canaries))}


def as_input(canaries: Mapping[str, CanaryConfig]) -> dict[str, Any]:
    """What of canaries the run's input consists of: all but what is expected of them."""
    return {
        name: [number, canary.source, list(canary.texts), canary.html, canary.url]
        for name, (number, canary) in numbered(canaries).items()
    }


def id_of(name: str, index: int) -> str:
    return f"canaries/{name}/{index}"


class PlantCanaries(PipelineStep):
    """Yields what comes and then, in the first task, the canaries."""

    name, type = "Canaries", "🐤 - READER"

    def __init__(self, canaries: Mapping[str, CanaryConfig], tallies: str) -> None:
        super().__init__()
        self.canaries = as_input(canaries)
        self.tallies = tallies

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        yield from data
        if rank:
            return
        tally = Tally()
        for name, (number, source, texts, html, url) in self.canaries.items():
            for index, text in enumerate(texts):
                size = len(text.encode())
                raw = {"path": f"canaries.{name}", "index": number, "bytes": size, "count": 1, "offset": 0}
                metadata = {"source": canaries_of(source), "file": raw["path"], "position": index, "url": url}
                tally.came_in(metadata["source"], size)
                yield Document(
                    text, id_of(name, index), metadata=metadata | {"raw": raw | {"html": html, "reason": ""}}
                )
        tally.save(Path(self.tallies) / "in-canaries.json")
