"""The first datatrove step of a run: the files of all sources to documents.

Every record of every file is yielded once, what cannot be used with a reason in `metadata["raw"]`: see
`extraction.SetAside`. A file that cannot be opened, or breaks off, is such a record too.
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
from data_pipeline.reading.files import find_files, is_http, is_remote, open_file
from data_pipeline.reading.ids import id_of_location, name_of, published_id, roots_of
from data_pipeline.reading.jsonl import read_jsonl
from data_pipeline.reading.parquet import read_parquet
from data_pipeline.reading.records import Advance, FoundFile, InputUnit, Record
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


def find_units(name: str, source: SourceConfig, unit_bytes: int) -> list[InputUnit]:
    """The files of a source as units of work; neighbours that are one document each share a unit of `unit_bytes`.

    Errors: ConfigError for a pattern that leads to nothing, or an encoding that is not known.
    """
    if not charset_of(source.encoding):
        raise ConfigError(
            f"sources.{name}.encoding = {source.encoding!r} is no encoding that is known; give its name on the web, "
            "such as windows-1251, shift_jis or utf-16le"
        )
    groups: list[list[FoundFile]] = []
    size = 0
    found = find_files(name, source)
    roots = roots_of(source.files, [file.path for file in found])
    for file in (replace(file, name=name_of(file.path, roots)) for file in found):
        if not groups or not _is_one_document(source) or size + file.size > unit_bytes:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    return [InputUnit(name, index, tuple(group), source) for index, group in enumerate(groups)]


def _is_one_document(source: SourceConfig) -> bool:
    """Whether a file of this source is one document."""
    return source.format in _ONE_DOCUMENT_A_FILE and source.document_per == "file"


def read_file(file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance) -> Iterator[Record]:
    """The records of a file. Whatever is wrong with the file is a record; errors of a connection are raised, as
    ConnectionError: they say nothing about the data.
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
            for record in _READERS[source.format](content, file, source, limits, advance):
                position = record.position
                yield record
    except (ConnectionError, TimeoutError) as error:
        raise _connection_error(file, error) from None
    except OSError as error:
        if is_http(file.path):  # fsspec calls every failure of a server a missing file
            raise _connection_error(file, error) from None
        yield Record(
            position, 0 if position else file.size, f"{type(error).__name__}: {error.strerror}", reason="unreadable"
        )
    except Exception as error:
        if is_remote(file.path) and type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
            # Raised anew, without the client's frames: a traceback of those shows signed requests.
            raise _connection_error(file, error) from None
        raise


def _connection_error(file: FoundFile, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{file.path} could not be read ({type(error).__name__}); run the same command again to go on"
    )


class SourceReader(PipelineStep):
    """Reads this task's share of `units`; counts what comes in. Documents carry source, file and position."""

    name, type = "Sources", "READER"

    def __init__(self, units: Sequence[InputUnit], limits: ExtractConfig, tallies: str, progress: str) -> None:
        super().__init__()
        # Largest first, so that no task is left alone with a big file at the end.
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
                    if unit.config.format == "warc":  # where a compressed member holds many, some share a position
                        positions[record.position] += 1
                    document = _document(unit, file, record, positions[record.position])
                    self.update_doc_stats(document)
                    yield document
        tally.save(Path(self.tallies) / f"in-{rank:05d}.json")
        progress.close()


def _document(unit: InputUnit, file: FoundFile, record: Record, again: int) -> Document:
    """`again` is how many records were found at this position of the file, this one among them."""
    position = f"{record.position}.{again}" if again > 1 else record.position
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
