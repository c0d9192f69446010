"""The first datatrove step: JSONL and WARC files to documents, with every broken record marked, none lost.

`SourceReader` yields one Document per record. A record that cannot be used carries a reason (`BROKEN` or
`UNWANTED`) in `metadata["reason"]` and is counted and set aside by `extraction.SetAside`. Files are local. A
gzipped WARC is read member by member, so that reading goes on after a corrupt member; a member has to fit in
memory. `ShardReader` reads the shards that the extract stage publishes. Extracting text from HTML is left to
`extraction`.
"""

import gzip
import io
import mmap
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers.jsonl import JsonlReader
from fastwarc.warc import ArchiveIterator, WarcRecordType
from resiliparse.parse.encoding import bytes_to_str, detect_encoding

from data_pipeline.executors.progress import ProgressFile
from data_pipeline.ledger import Tally

# Reasons for which a record counts as broken, and so towards extract.max_bad_share.
BROKEN = frozenset(
    {
        "invalid_utf8",
        "bad_json",
        "not_an_object",
        "missing_text",
        "text_not_a_string",
        "empty",
        "cut_gzip",
        "corrupt_gzip",
        "bad_warc",
        "cut_record",
    }
)
# Sound records that hold no page.
UNWANTED = frozenset({"http_error", "not_html", "no_main_text"})

_SAMPLE_BYTES = 300
_BLOCK = 1 << 16
_GZIP_MAGIC = b"\x1f\x8b\x08"
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_PAGE_RECORDS = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion


@dataclass(frozen=True)
class InputFile:
    """One file of a source. `index` is its place among the source's files, sorted by name."""

    source: str
    index: int
    path: str
    format: str
    text_key: str
    id_key: str


@dataclass
class Record:
    """What was read: text or, with `html`, a page.

    `position` is a line (from 1) or a byte offset in the file.
    """

    position: int
    size: int
    text: str = ""
    id: str = ""
    html: bool = False
    reason: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


class SourceReader(PipelineStep):
    """Reads this task's share of `files`; counts what comes in. Documents carry source, file and position."""

    name, type = "Sources", "READER"

    def __init__(self, files: Sequence[InputFile], tallies: str, progress: str) -> None:
        super().__init__()
        # Largest first, so that no task is left alone with a big file at the end.
        self.files = sorted(files, key=lambda file: (-Path(file.path).stat().st_size, file.path))
        self.tallies = tallies
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tally = Tally()
        progress = ProgressFile(self.progress, rank)
        for file in self.files[rank::world_size]:
            read = read_warc if file.format == "warc" else read_jsonl
            for record in read(file, progress.advance):
                tally.came_in(file.source, record.size)
                document = self._document(file, record)
                self.update_doc_stats(document)
                yield document
        tally.save(Path(self.tallies) / f"in-{rank:05d}.json")
        progress.close()

    def _document(self, file: InputFile, record: Record) -> Document:
        return Document(
            text=record.text,
            id=record.id or f"{file.source}/{Path(file.path).name}/{record.position}",
            metadata={
                "source": file.source,
                "file": file.path,
                "position": record.position,
                **record.metadata,
                "raw": {
                    "path": file.path,
                    "index": file.index,
                    "bytes": record.size,
                    "html": record.html,
                    "reason": record.reason,
                },
            },
        )


def read_jsonl(file: InputFile, advance: Callable[[int], None]) -> Iterator[Record]:
    """One record a line; blank lines are no records. `advance` is told of bytes read from disk."""
    number = 0
    rest = b""
    seen = 0
    with open(file.path, "rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if file.path.endswith(".gz") else raw
        while True:
            try:
                block = stream.read1(_BLOCK)
            except (EOFError, OSError, zlib.error) as error:
                reason = "cut_gzip" if isinstance(error, EOFError) else "corrupt_gzip"
                yield Record(number + 1, len(rest), _sample(rest), reason=reason)
                return
            advance(raw.tell() - seen)
            seen = raw.tell()
            *lines, rest = (rest + block).split(b"\n") if block else [rest, b""]
            for line in lines:
                number += 1
                if line.strip():
                    yield _json_record(line, number, file)
            if not block:
                return


def _json_record(line: bytes, number: int, file: InputFile) -> Record:
    record = Record(number, len(line))
    try:
        line.decode("utf-8")
        fields = orjson.loads(line)
    except UnicodeDecodeError:
        record.reason = "invalid_utf8"
    except orjson.JSONDecodeError:
        record.reason = "bad_json"
    else:
        if not isinstance(fields, dict):
            record.reason = "not_an_object"
        elif fields.get(file.text_key) is None:
            record.reason = "missing_text"
        elif not isinstance(fields[file.text_key], str):
            record.reason = "text_not_a_string"
        elif not fields[file.text_key].strip():
            record.reason = "empty"
        else:
            record.text = fields[file.text_key]
            if isinstance(fields.get("metadata"), dict):
                record.metadata["record"] = fields["metadata"]
        if isinstance(fields, dict) and isinstance(fields.get(file.id_key), str | int):
            record.id = str(fields[file.id_key])
    if record.reason:
        record.text = _sample(line)
    return record


def read_warc(file: InputFile, advance: Callable[[int], None]) -> Iterator[Record]:
    """Responses, resources and conversions of a WARC file, gzipped or not; other record types are no
    documents.
    """
    if Path(file.path).stat().st_size == 0:
        yield Record(0, 0, reason="cut_gzip" if file.path.endswith(".gz") else "bad_warc")
        return
    with open(file.path, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:2] != _GZIP_MAGIC[:2]:
            yield from _warc_records(raw, 0)
            advance(len(data))
            return
        seen = 0
        for offset, member, reason, size in _members(data):
            if member is None:
                yield Record(offset, size, reason=reason)
            else:
                yield from _warc_records(io.BytesIO(member), offset)
            advance(offset + size - seen)
            seen = offset + size


def _members(data: mmap.mmap) -> Iterator[tuple[int, bytes | None, str, int]]:
    """(offset, content or None, reason, compressed size) per gzip member; a stretch that is none counts as
    one.
    """
    position, bad_since, was_cut = 0, -1, False
    while position < len(data):
        member, end, cut = _inflate(data, position)
        if member is None:
            if bad_since < 0:
                bad_since, was_cut = position, cut
            # A corrupt member may well inflate up to the end of the file, over sound ones: look for those all the same.
            following = data.find(_GZIP_MAGIC, position + 1)
            if following < 0:
                yield bad_since, None, "cut_gzip" if was_cut else "corrupt_gzip", len(data) - bad_since
                return
            position = following
            continue
        if bad_since >= 0:
            yield bad_since, None, "corrupt_gzip", position - bad_since
            bad_since = -1
        yield position, member, "", end - position
        position = end
    assert bad_since < 0


def _inflate(data: mmap.mmap, start: int) -> tuple[bytes | None, int, bool]:
    """(content or None, end, whether the file ended inside) of the gzip member at `start`."""
    inflater = zlib.decompressobj(wbits=31)
    chunks = []
    cursor = start
    try:
        while not inflater.eof and cursor < len(data):
            block = data[cursor : cursor + _BLOCK]
            chunks.append(inflater.decompress(block))
            cursor += len(block)
    except zlib.error:
        return None, start, False
    if not inflater.eof:
        return None, start, True
    return b"".join(chunks), cursor - len(inflater.unused_data), False


def _warc_records(stream: Any, offset: int) -> Iterator[Record]:
    position = offset
    try:
        for entry in ArchiveIterator(stream, record_types=_PAGE_RECORDS, parse_http=True):
            position = offset + entry.stream_pos
            yield _warc_record(entry, position)
    except (OSError, ValueError) as error:
        yield Record(position, 0, str(error)[:_SAMPLE_BYTES], reason="bad_warc")


def _warc_record(entry: Any, position: int) -> Record:
    payload = entry.reader.read()
    record = Record(position, len(payload), id=entry.record_id or "")
    if url := entry.headers.get("WARC-Target-URI"):
        record.metadata["url"] = url
    kind = (entry.http_content_type or entry.headers.get("Content-Type") or "").split(";")[0].strip().lower()
    plain = entry.record_type == WarcRecordType.conversion and kind == "text/plain"
    if len(payload) < entry.content_length:
        record.reason = "cut_record"
    elif entry.http_headers is not None and entry.http_headers.status_code not in (200, None):
        record.reason = "http_error"
    elif not payload.strip():
        record.reason = "empty"
    elif not plain and kind not in _HTML_TYPES:
        record.reason = "not_html"
    if record.reason:
        record.text = _sample(payload)
        return record
    record.html = not plain
    record.text = bytes_to_str(payload, detect_encoding(payload, html5_compatible=True) or "utf-8")
    return record


def _sample(content: bytes) -> str:
    return content[:_SAMPLE_BYTES].decode("utf-8", errors="replace")


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
