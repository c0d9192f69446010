"""Helpers of the reading tests: pages, WARC files of them, and the records that a reader finds in a file."""

import io
from collections.abc import Sequence
from pathlib import Path

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.input_records import FoundFile, Record
from data_pipeline.reading.source_reader import read_file

PAGE = "<html><body><main><p>The page number {}, and enough words to be one.</p></main></body></html>"


def read(path: Path, content: bytes, kind: str = "jsonl", **limits: float) -> list[Record]:
    path.write_bytes(content)
    source = SourceConfig(files=("-",), format=kind, rules={"any": "r"})
    advanced = []
    records = list(read_file(FoundFile(str(path), len(content)), source, ExtractConfig(**limits), advanced.append))
    assert sum(advanced) == len(content)
    return records


def reasons(records: list[Record]) -> list[str]:
    return [record.reason for record in records]


def warc(
    pages: list[bytes],
    status: str = "200 OK",
    kind: str = "text/html; charset=utf-8",
    extra: Sequence[tuple[str, str]] = (),
) -> list[bytes]:
    """Makes WARC response records of pages, each a gzip member."""
    members = []
    for number, page in enumerate(pages):
        buffer = io.BytesIO()
        writer = WARCWriter(buffer, gzip=True)
        headers = StatusAndHeaders(status, [("Content-Type", kind), *extra], protocol="HTTP/1.1")
        record = writer.create_warc_record(
            f"http://example.org/{number}", "response", payload=io.BytesIO(page), http_headers=headers
        )
        writer.write_record(record)
        members.append(buffer.getvalue())
    return members
