"""Parquet files: one record a row, read in batches of bounded memory.

A row group whose text expands beyond the limits is not read. Text stays in its dictionary until a row is wanted, since
a few kilobytes can stand for gigabytes of equal rows. A page is decoded whole, though, so that memory is at least a
page's; writers keep pages near 1 MB. Encrypted files are left out.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from configs.data import ExtractConfig, SourceConfig
from data_pipeline.reading.jsonl import fill
from data_pipeline.reading.records import SAMPLE_BYTES, Advance, FoundFile, Record, sample

_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 1000
_RATIO_FLOOR = 1 << 20  # as in decompression


def read_parquet(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    """`position` is the row, from 1; rows that cannot be read any more are one record, with their `count`."""
    try:
        metadata = pq.read_metadata(content)
        leaves = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
        rows, groups = metadata.num_rows, metadata.num_row_groups
        if source.text_key not in leaves:
            said = f"columns: {', '.join(leaves)}"[:SAMPLE_BYTES]
            yield from [Record(1, file.size, said, reason="missing_text", count=rows)] if rows else []
            return
        place = leaves.index(source.text_key)
        if any(metadata.row_group(number).num_columns <= place for number in range(groups)) or rows < groups:
            raise pa.ArrowInvalid("the footer contradicts itself")
        dictionary = [source.text_key] if _is_binary(metadata, place) else []
        table = pq.ParquetFile(
            content, metadata=metadata, read_dictionary=dictionary, pre_buffer=False, buffer_size=1 << 20
        )
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:  # a damaged footer can say anything
        yield Record(0, file.size, str(error)[:SAMPLE_BYTES], reason="bad_parquet")
        return
    names = table.schema_arrow.names
    columns = [name for name in (source.text_key, source.id_key, source.url_key, "metadata") if name in names]
    first, done, expanded = 1, 0, 0
    for number in range(groups):
        group = table.metadata.row_group(number)
        text = group.column(place)
        expanded += text.total_uncompressed_size
        if _is_bomb(text, limits) or expanded > limits.max_expanded_bytes:
            size = max(0, text.total_compressed_size)
            yield Record(first, size, reason="expansion_limit", count=max(1, group.num_rows))
        else:
            yield from _rows(table, number, first, columns, source, limits)
        first += group.num_rows
        advance(file.size * (number + 1) // groups - done)
        done = file.size * (number + 1) // groups


def _is_binary(metadata: pq.FileMetaData, column: int) -> bool:
    return metadata.schema.column(column).physical_type == "BYTE_ARRAY"


def _is_bomb(text: Any, limits: ExtractConfig) -> bool:
    size = text.total_uncompressed_size
    return size > _RATIO_FLOOR and size > limits.max_expansion * max(1, text.total_compressed_size)


def _rows(
    table: pq.ParquetFile, number: int, first: int, columns: list[str], source: SourceConfig, limits: ExtractConfig
) -> Iterator[Record]:
    group = table.metadata.row_group(number)
    row, end = first, first + group.num_rows
    size = max(1, group.total_byte_size // max(1, group.num_rows))
    try:
        batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // size))
        for batch in table.iter_batches(batch_rows, row_groups=[number], columns=columns):
            for place in range(batch.num_rows):
                yield _row(batch, place, row, source, limits)
                row += 1
    except (OSError, pa.ArrowException) as error:
        lost = max(0, group.total_byte_size) * (end - row) // max(1, group.num_rows)
        yield Record(row, lost, str(error)[:SAMPLE_BYTES], reason="bad_parquet", count=max(1, end - row))


def _row(batch: pa.RecordBatch, place: int, row: int, source: SourceConfig, limits: ExtractConfig) -> Record:
    fields: dict[str, Any] = {}
    record = Record(row, 0)
    try:
        value = batch.column(source.text_key)[place]
        text = value.value if isinstance(value, pa.DictionaryScalar) else value
        if hasattr(text, "as_buffer") and text.is_valid:
            content = text.as_buffer()
            record.size = content.size
            if content.size > limits.max_record_bytes:
                record.reason, record.text = "record_too_large", sample(content[:SAMPLE_BYTES].to_pybytes())
                return record
        fields = {name: batch.column(name)[place].as_py() for name in batch.schema.names}
        if isinstance(fields[source.text_key], bytes):
            fields[source.text_key] = fields[source.text_key].decode("utf-8")
    except UnicodeDecodeError as error:
        record.reason, record.text = "invalid_utf8", sample(error.object)
        return record
    fill(record, fields, source)
    return record
