"""Plants canaries, documents with a known fate, in a run's input; at the run's end, `check` tells what became of them.

Canaries enter after the readers. The same tasks and rules extract, score, filter, deduplicate and cut them as the
documents of their source, in shards of their own (`core.canary_naming`); the documents stage drops them. They do not
test the reading of files, comparison with the sources' documents, the tokenizer or the plan.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from configs.canaries import CanaryConfig
from data_pipeline.core.canary_naming import canaries_of
from data_pipeline.core.ledger import Tally

FATES = "canaries.jsonl"  # in the documents stage's folder: id, reason and bytes cut, of the canaries that reached it
LEFT_OUT = "canary"  # reason for which the documents stage drops a canary that no stage dropped


def numbered(canaries: Mapping[str, CanaryConfig]) -> dict[str, tuple[int, CanaryConfig]]:
    """Returns {name: (number, canary)}; the number names the canary's shards."""
    return {name: (number, canaries[name]) for number, name in enumerate(sorted(canaries))}


def as_input(canaries: Mapping[str, CanaryConfig]) -> dict[str, Any]:
    """Returns the part of the canaries' config that is input of the run: all but the expected fate."""
    return {
        name: [number, canary.source, list(canary.texts), canary.html, canary.url]
        for name, (number, canary) in numbered(canaries).items()
    }


def id_of(name: str, index: int) -> str:
    """Returns the id of a canary's text of the given index."""
    return f"canaries/{name}/{index}"


class PlantCanaries(PipelineStep):
    """Passes all documents on; the first task adds the canaries after its own."""

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
