"""First datatrove step of a run: reads the files of all sources as documents.

Every record of every file is yielded once. A record that cannot be used has a reason in `metadata["raw"]`, which
`extraction.extract.SetAside` evaluates. A file that cannot be opened, or that ends in a read error, yields such a
record too.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from configs.loader import ConfigError
from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.core.ledger import Tally
from data_pipeline.core.progress import ProgressFile
from data_pipeline.reading.charsets import charset_of
from data_pipeline.reading.decompression import foreign_compression
from data_pipeline.reading.ids import id_of_location, name_of, published_id, roots_of
from data_pipeline.reading.input_records import NOT_READ, Advance, FoundFile, InputUnit, Record
from data_pipeline.reading.jsonl import read_jsonl
from data_pipeline.reading.parquet import read_parquet
from data_pipeline.reading.source_files import find_files, is_http, is_remote, open_file
from data_pipeline.reading.trees import read_code, read_html, read_text
from data_pipeline.reading.warc import read_warc

_READERS = {
    "jsonl": read_jsonl,
    "warc": read_warc,
    "parquet": read_parquet,
    "text": read_text,
    "html": read_html,
    "code": read_code,
}
_ONE_DOCUMENT_A_FILE = ("text", "html", "code")


def find_units(name: str, source: SourceConfig, unit_bytes: int, section: str = "") -> list[InputUnit]:
    """Finds the files of a source and groups them into units of work.

    Files that are one document each share units of at most `unit_bytes` with their neighbours; every other file is a
    unit of its own. Raises ConfigError for a pattern that matches no file, or an unknown encoding; it names the
    source's config section, by default sources.NAME.
    """
    section = section or f"sources.{name}"
    if not charset_of(source.encoding):
        raise ConfigError(
            f"{section}.encoding = {source.encoding!r} is not a known encoding; give its name in the WHATWG "
            "Encoding Standard, such as windows-1251, shift_jis or utf-16le"
        )
    groups: list[list[FoundFile]] = []
    size = 0
    found = find_files(name, source, section)
    roots = roots_of(source.files, [file.path for file in found])
    for file in (replace(file, name=name_of(file.path, roots)) for file in found):
        if not groups or not _is_one_document(source) or size + file.size > unit_bytes:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    return [InputUnit(name, index, tuple(group), source) for index, group in enumerate(groups)]


def _is_one_document(source: SourceConfig) -> bool:
    """Whether each file of this source is one document."""
    return source.format in _ONE_DOCUMENT_A_FILE and source.document_per == "file"


def read_file(file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance) -> Iterator[Record]:
    """Yields the records of a file; a file that cannot be read yields a record with the reason.

    Raises ConnectionError if a remote system fails, since that says nothing about the data.
    """
    position = 0
    if file.reason:
        yield Record(0, file.size, reason=file.reason)
        return
    if file.size == 0 and not _is_one_document(source):
        yield Record(0, 0, reason="empty_file")
        return
    try:
        with open_file(file.path) as content:
            if source.format != "parquet" and foreign_compression(content, limits):
                yield Record(0, file.size, reason=NOT_READ)
                return
            for record in _READERS[source.format](content, file, source, limits, advance):
                position = record.position
                yield record
    except (ConnectionError, TimeoutError) as error:
        raise _connection_error(file, error) from None
    except OSError as error:
        if is_http(file.path):  # fsspec reports every failure of a server as a missing file
            raise _connection_error(file, error) from None
        yield Record(
            position, 0 if position else file.size, f"{type(error).__name__}: {error.strerror}", reason="unreadable"
        )
    except Exception as error:
        if is_remote(file.path) and type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
            # A new error without the client's traceback, which would show signed requests.
            raise _connection_error(file, error) from None
        raise


def _connection_error(file: FoundFile, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{file.path} could not be read ({type(error).__name__}); run the same command again to go on"
    )


class SourceReader(PipelineStep):
    """Reads this task's share of `units` and counts all records in the ledger.

    Each document's metadata has its source, file and position.
    """

    name, type = "Sources", "READER"

    def __init__(self, units: Sequence[InputUnit], limits: ExtractConfig, tallies: str, progress: str) -> None:
        super().__init__()
        # Largest first, so that no task is still busy with a big file when all others have finished.
        self.units = sorted(units, key=lambda unit: (-unit.size, unit.files[0].path))
        self.limits = limits
        self.tallies = tallies
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tally = Tally()
        progress = ProgressFile(self.progress, rank)
        for unit in self.units[rank::world_size]:
            for file in unit.files:
                positions = Counter[int]()
                for record in read_file(file, unit.config, self.limits, progress.advance):
                    tally.came_in(unit.source, record.size, record.count)
                    if unit.config.format == "warc":  # records of one compressed member may share a position
                        positions[record.position] += 1
                    document = _document(unit, file, record, occurrence=positions[record.position])
                    self.update_doc_stats(document)
                    yield document
        tally.save(Path(self.tallies) / f"in-{rank:05d}.json")
        progress.close()


def _document(unit: InputUnit, file: FoundFile, record: Record, occurrence: int) -> Document:
    """Makes a document of a record; `occurrence` numbers WARC records that share a position, from 1 (else 0)."""
    position = f"{record.position}.{occurrence}" if occurrence > 1 else record.position
    whole = _is_one_document(unit.config) or (not record.position and unit.config.format != "warc")
    return Document(
        text=record.text,
        id=published_id(record.id) if record.id else id_of_location(unit.source, file.name, "" if whole else position),
        metadata={
            "source": unit.source,
            "file": file.path,
            "position": record.position,
            **record.metadata,
            "raw": {
                "path": file.path,
                "index": unit.index,
                "bytes": record.size,
                "count": record.count,
                "offset": record.offset,
                "html": record.html,
                "charset_from": record.charset_from,
                "reason": record.reason,
                "notes": sorted(record.notes),
            },
        },
    )
