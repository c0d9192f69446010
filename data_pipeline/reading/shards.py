"""The shards that the extract stage publishes, read back for every later stage."""

from collections.abc import Sequence

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.readers.jsonl import JsonlReader

from data_pipeline.executors.progress import ProgressFile


class ShardReader(JsonlReader):
    """Reads published shards, `<source>/<name>.jsonl.gz` under `folder`; `metadata["row"]` numbers a shard's
    rows.
    """

    name = "Shards"

    def __init__(self, folder: str, shards: Sequence[str], progress: str) -> None:
        super().__init__(folder, add_file_path=False)
        self.shards = list(shards)
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        progress = ProgressFile(self.progress, rank)
        for shard in self.shards[rank::world_size]:
            for row, document in enumerate(self.read_file(f"{shard}.jsonl.gz")):
                document.metadata["shard"], document.metadata["row"] = shard, row
                document.metadata["bytes"] = len(document.text.encode())
                progress.advance(document.metadata["bytes"])
                yield document
        progress.close()
