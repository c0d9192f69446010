"""Texts between stages: `<source>/<name>.jsonl.zst`, a shard, one JSON object a line.

datatrove's JSONL writer and reader, but for three things. Compression is Zstandard's at level 3: smaller files than
gzip's, and less waiting for them both ways. A task of many shards has the files of one open. And a shard that was
damaged or cut short is an error, not a shorter shard.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow as pa
import zstandard
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.jsonl import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from fsspec.compression import compr, register_compression

from data_pipeline.core.integrity import seal
from data_pipeline.core.progress import ProgressFile

_SUFFIX = ".jsonl.zst"
_LEVEL = 3
_NAME = f"zstd-{_LEVEL}"
_BUFFER = 1 << 18


class TextWriter(JsonlWriter):
    """`<folder>/<filename>.jsonl.zst`; `filename` may name metadata, as in ${source}/${shard}.

    A task may have thousands of shards: a shard's files are closed when the next shard's documents come.
    Errors: ValueError for a document of a shard that is closed.
    """

    def __init__(self, folder: str, filename: str, adapter: Callable[[PipelineStep, Document], dict[str, Any]]) -> None:
        super().__init__(folder, f"{filename}{_SUFFIX}", compression=_NAME, adapter=adapter)
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if _NAME not in compr:  # in the worker
            register_compression(_NAME, _zstd, [])
        return super().run(self._closing(data), rank, world_size)

    def _closing(self, documents: DocumentsPipeline) -> DocumentsPipeline:
        seen = set()
        for shard, of_shard in groupby(documents, key=lambda one: (one.metadata["source"], one.metadata["shard"])):
            if shard in seen:
                raise ValueError(f"documents of shard {shard[1]} of {shard[0]} do not come one after another")
            seen.add(shard)
            yield from of_shard
            written = [Path(self.folder) / name for name in self.output_mg.get_open_files()]
            self.output_mg.close()
            for path in written:
                seal(path)


def _zstd(file: IO[bytes], mode: str = "wb") -> zstandard.ZstdCompressionWriter:
    return zstandard.ZstdCompressor(_LEVEL, write_checksum=True).stream_writer(file)


class ShardReader(JsonlReader):
    """Reads published shards; `metadata["row"]` numbers a shard's rows."""

    name = "Shards"

    def __init__(self, folder: str, shards: Sequence[str], progress: str) -> None:
        super().__init__(folder, add_file_path=False)
        self.folder = folder
        self.shards = list(shards)
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        progress = ProgressFile(self.progress, rank)
        for shard in self.shards[rank::world_size]:
            path = shard_path(self.folder, shard)
            for row, record in enumerate(read_records(path)):
                with self.track_time():
                    document = self.get_document_from_dict(record, str(path), row)
                document.metadata["shard"], document.metadata["row"] = shard, row
                document.metadata["bytes"] = len(document.text.encode())
                progress.advance(document.metadata["bytes"])
                yield document
        progress.close()


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Writes a shard anew, as `TextWriter` would have."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file, _zstd(file) as out:
        for record in records:
            out.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
    temporary.replace(path)


def shard_path(folder: str | Path, shard: str) -> Path:
    return Path(folder) / f"{shard}{_SUFFIX}"


def shards_under(folder: Path) -> list[str]:
    """Lists all shards below a folder, at any depth, as sorted relative paths without the suffix."""
    return sorted(path.relative_to(folder).as_posix().removesuffix(_SUFFIX) for path in folder.rglob(f"*{_SUFFIX}"))


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a shard, each with text under "text".

    Errors: ValueError that names the file and line, for one that is missing, damaged or cut short.
    """
    number = 0
    try:
        # zstandard's own stream ends without a word where a frame is cut short.
        with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, "zstd") as stream:
            if not file.size():
                raise ValueError("it is empty")
            for line in io.BufferedReader(stream, _BUFFER):
                number += 1
                record = orjson.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("text"), str) or not record["text"]:
                    raise ValueError('expected an object with text under "text"')
                yield record
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: {error}; remove the stage's folder and run it again") from None
