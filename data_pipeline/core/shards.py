"""Reads and writes shards, the files that hold texts between stages: `<source>/<name>.jsonl.zst`, one object a line.

Extends datatrove's JSONL writer and reader by three things. Compression is Zstandard at level 3, which makes smaller
files than gzip and is faster both ways. A task with many shards has the files of only one open at a time. And a
damaged or truncated shard is an error, where datatrove would read a shorter shard.
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

from data_pipeline.core.integrity import remedy, seal
from data_pipeline.core.progress import ProgressFile

TRAIN, HELDOUT = "train", "heldout"  # folders of the two splits, in the documents and tokens stages
_SUFFIX = ".jsonl.zst"
_LEVEL = 3
_NAME = f"zstd-{_LEVEL}"
_BUFFER = 1 << 18


class TextWriter(JsonlWriter):
    """Writes documents to `<folder>/<filename>.jsonl.zst`; `filename` may name metadata, as in ${source}/${shard}.

    Since a task may have thousands of shards, a shard's files are closed when the next shard's documents begin. Raises
    ValueError if a document of a closed shard comes later.
    """

    def __init__(self, folder: str, filename: str, adapter: Callable[[PipelineStep, Document], dict[str, Any]]) -> None:
        super().__init__(folder, f"{filename}{_SUFFIX}", compression=_NAME, adapter=adapter)
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if _NAME not in compr:  # registered here since this runs in the worker process
            register_compression(_NAME, _zstd, [])
        return super().run(self._closing(data), rank, world_size)

    def _closing(self, documents: DocumentsPipeline) -> DocumentsPipeline:
        """Yields the documents; closes and seals a shard's files after its last document."""
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
    """Reads shards as documents; `metadata` gets the shard, the row in it from 0 on, and the text's UTF-8 bytes."""

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
    """Writes and seals a whole shard, in the format of `TextWriter`, and replaces the file that was there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file, _zstd(file) as out:
        for record in records:
            out.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
    temporary.replace(path)
    seal(path)


def shard_path(folder: str | Path, shard: str) -> Path:
    """Path of the file of a shard, named `<source>/<name>`, in a stage's folder."""
    return Path(folder) / f"{shard}{_SUFFIX}"


def shards_under(folder: Path) -> list[str]:
    """Lists all shards below a folder, at any depth, as sorted relative paths without the suffix."""
    return sorted(path.relative_to(folder).as_posix().removesuffix(_SUFFIX) for path in folder.rglob(f"*{_SUFFIX}"))


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a shard, each with a text under the key "text".

    Raises ValueError with the file and the last line that was read if the shard is missing, damaged or truncated.
    """
    number = 0
    try:
        # pyarrow's stream raises an error for a truncated frame; zstandard's own just ends.
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
        where = f"{path}, line {number}" if number else str(path)
        raise ValueError(f"{where}: {error}; {remedy(Path(path))}") from None
