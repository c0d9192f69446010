"""Texts out of a stage: datatrove's JSONL writer, gzipped at a level that writing does not wait for.

At zlib's highest level, which is the default below datatrove, compression takes more time than most of the work does;
level 4 is several times as fast for files a few percent larger. No time of writing stands in the files.
"""

import gzip
from collections.abc import Callable
from typing import IO, Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.jsonl import JsonlWriter
from fsspec.compression import compr, register_compression

_LEVEL = 4
_NAME = f"gzip-{_LEVEL}"


class TextWriter(JsonlWriter):
    """`<folder>/<filename>.jsonl.gz`; `filename` may name metadata, as in ${source}/${shard}."""

    def __init__(self, folder: str, filename: str, adapter: Callable[[PipelineStep, Document], dict[str, Any]]) -> None:
        super().__init__(folder, f"{filename}.jsonl.gz", compression=_NAME, adapter=adapter)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        if _NAME not in compr:  # in the worker
            register_compression(_NAME, _gzip, [])
        return super().run(data, rank, world_size)


def _gzip(file: IO[bytes], mode: str = "wb") -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=file, mode=mode, compresslevel=_LEVEL, mtime=0, filename="")
