"""Reader of Parquet files: one record per row, in batches of bounded memory.

A row group whose text expands beyond the limits is not read. Other columns of a row group are left out if their values
are above `extract.max_fields_bytes` on average. Text is kept dictionary-encoded until a row is read, since a few
kilobytes can stand for gigabytes of equal rows. A Parquet page is always decoded whole, so memory is at least that of
one page; writers keep pages near 1 MB. Values that JSON cannot represent become strings. Encrypted files are not
supported.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.fields import LEFT_OUT, fill, lookup, plain
from data_pipeline.reading.input_records import SAMPLE_BYTES, Advance, FoundFile, Record, sample

_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 1000
_DELTA_ROWS = 16  # of columns in which a few bytes can stand for a long value
_RATIO_FLOOR = 1 << 20  # bytes; expansion is judged only above this size, as in `decompression`
_OUT_OF_RANGE = "<value out of range"  # what pyarrow writes in place of a date beyond its calendar


def read_parquet(
    content: BinaryIO, file: FoundFile, source: SourceConfig, limits: ExtractConfig, advance: Advance
) -> Iterator[Record]:
    """Yields one record per row, with the row number (from 1) as `position`.

    Rows that cannot be read are reported as one record that has their number as `count`.
    """
    try:
        metadata = pq.read_metadata(content)
        leaves = leaves_of(metadata)
        rows, groups = metadata.num_rows, metadata.num_row_groups
        if leaves.count(source.text_key) > 1:
            raise pa.ArrowInvalid(f"{leaves.count(source.text_key)} columns are named {source.text_key!r}")
        if source.text_key not in leaves:
            said = f"columns: {', '.join(leaves)}"[:SAMPLE_BYTES]
            yield from [Record(1, file.size, said, reason="missing_text", count=rows)] if rows else []
            return
        position = leaves.index(source.text_key)
        columns = [metadata.row_group(number).num_columns for number in range(groups)]
        if any(count <= position for count in columns) or rows != _rows_in(metadata):
            raise pa.ArrowInvalid("the footer contradicts itself")
        table = pq.ParquetFile(
            content,
            metadata=metadata,
            read_dictionary=[leaf for number, leaf in enumerate(leaves) if _is_text(metadata, number)],
            pre_buffer=False,
            buffer_size=1 << 20,
        )
        _ = table.schema_arrow
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:  # a damaged footer can cause any of these
        yield Record(0, file.size, str(error)[:SAMPLE_BYTES], reason="bad_parquet")
        return
    first, done, expanded = 1, 0, 0
    for number in range(groups):
        group = table.metadata.row_group(number)
        text = group.column(position)
        expanded += text.total_uncompressed_size
        if _is_bomb(text, limits) or expanded > limits.max_expanded_bytes:
            size = max(0, text.total_compressed_size)
            yield Record(first, size, reason="expansion_limit", count=max(1, group.num_rows))
        elif group.num_rows:
            yield from _rows(table, number, first, source, limits)
        first += group.num_rows
        advance(file.size * (number + 1) // groups - done)
        done = file.size * (number + 1) // groups


def leaves_of(metadata: pq.FileMetaData) -> list[str]:
    """Returns the paths of all leaf columns, such as `a.b` for b in the struct a."""
    return [metadata.schema.column(number).path for number in range(metadata.num_columns)]


def _rows_in(metadata: pq.FileMetaData) -> int:
    return sum(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))


def _is_text(metadata: pq.FileMetaData, number: int) -> bool:
    column = metadata.schema.column(number)
    plain_bytes = column.physical_type == "BYTE_ARRAY" and column.logical_type.type != "DECIMAL"
    return bool(plain_bytes and column.max_repetition_level == 0) and not _is_delta(metadata, (number,))


def _is_delta(metadata: pq.FileMetaData, numbers: Iterable[int]) -> bool:
    """Whether one of these columns has delta-encoded values, which pyarrow cannot keep dictionary-encoded."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in numbers if number < group.num_columns]
    return any("DELTA" in encoding and "BYTE_ARRAY" in encoding for chunk in chunks for encoding in chunk.encodings)


def _is_bomb(text: Any, limits: ExtractConfig) -> bool:
    size = text.total_uncompressed_size
    return bool(size > _RATIO_FLOOR and size > limits.max_expansion * max(1, text.total_compressed_size))


def _wanted(table: pq.ParquetFile, number: int, source: SourceConfig, limits: ExtractConfig) -> tuple[list[str], bool]:
    """Returns (columns of a row group to read, whether other configured columns are left out as too large)."""
    group = table.metadata.row_group(number)
    read, left_out = [], False
    for position, leaf in enumerate(leaves_of(table.metadata)[: group.num_columns]):
        column = group.column(position)
        if _is_named(leaf, source):
            fits = leaf == source.text_key or not _is_bomb(column, limits)
        elif source.fields == "all" or any(_leads_to(key, leaf) for key in source.fields):
            large = column.total_uncompressed_size > limits.max_fields_bytes * max(1, group.num_rows)
            fits = not large and not _is_bomb(column, limits)
        else:
            continue
        if fits:
            read.append(leaf)
        left_out |= not fits
    return read, left_out


def _is_named(leaf: str, source: SourceConfig) -> bool:
    keys = (source.text_key, source.id_key, source.url_key, source.metadata_key)
    return any(_leads_to(key, leaf) for key in keys)


def _leads_to(key: str, leaf: str) -> bool:
    """Tells whether a key names the column `leaf` or a struct that contains it."""
    return leaf == key or leaf.startswith(f"{key}.")


def _rows(
    table: pq.ParquetFile, number: int, first: int, source: SourceConfig, limits: ExtractConfig
) -> Iterator[Record]:
    """Yields the records of row group `number`, whose first row is row `first` of the file."""
    group = table.metadata.row_group(number)
    row, end = first, first + group.num_rows
    size = max(1, group.total_byte_size // max(1, group.num_rows))
    columns, left_out = _wanted(table, number, source, limits)
    bare = [leaf for leaf in columns if _is_named(leaf, source)]
    # If a damaged page belongs to a column that is only carried along, the rows are read again without such columns.
    for attempt, leaves in enumerate([columns, bare] if bare != columns else [columns]):
        at = first
        try:
            most = _DELTA_ROWS if _is_delta(table.metadata, range(group.num_columns)) else _BATCH_ROWS
            batch_rows = max(1, min(most, _BATCH_BYTES // size))
            for batch in table.iter_batches(batch_rows, row_groups=[number], columns=leaves):
                columns_by_name = _by_name(batch)
                for position in range(max(0, row - at), batch.num_rows):
                    record = _row(columns_by_name, position, row, source, limits)
                    if left_out or attempt:
                        record.notes.add(LEFT_OUT)
                    yield record
                    row += 1
                at += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            if leaves != bare:
                continue
            lost = max(0, group.total_byte_size) * (end - row) // max(1, group.num_rows)
            yield Record(row, lost, str(error)[:SAMPLE_BYTES], reason="bad_parquet", count=max(1, end - row))
        return


def _by_name(batch: pa.RecordBatch) -> dict[str, Any]:
    """Returns the columns of a batch by name; of columns with one name, the first."""
    columns: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        columns.setdefault(name, column)
    return columns


def _row(columns: dict[str, Any], position: int, row: int, source: SourceConfig, limits: ExtractConfig) -> Record:
    """Makes a record of one row of a batch, given by its columns."""
    record, content = Record(row, 0), None
    try:
        text = _text_of(columns, position, source.text_key)
        if hasattr(text, "as_buffer") and text.is_valid:
            content = text.as_buffer()
            record.size = content.size
            if content.size > limits.max_record_bytes:
                record.reason, record.text = "record_too_large", sample(content[:SAMPLE_BYTES].to_pybytes())
                return record
            content = content.to_pybytes().decode()
        fields = {name: _value(column[position], record.notes) for name, column in columns.items()}
    except UnicodeDecodeError as error:
        record.reason, record.text = "invalid_utf8", sample(error.object)
        return record
    except (ValueError, OverflowError, TypeError, pa.ArrowException) as error:  # a value that Python cannot hold
        record.reason, record.text = "bad_parquet", str(error)[:SAMPLE_BYTES]
        return record
    if text.is_valid and (found := lookup(fields, source.text_key)):
        found[0][found[1]] = content  # the str, or None if the column holds no strings
        record.reason = "" if isinstance(content, str) else "text_not_a_string"
    if not record.reason:
        fill(record, fields, source, limits)
    return record


def _text_of(columns: dict[str, Any], position: int, key: str) -> Any:
    """Returns the scalar under a key; the key may lead into structs, as a.b, unless a column is itself named a.b."""
    if key in columns:
        scalar = columns[key][position]
    else:
        names = key.split(".")
        start = next(end for end in range(1, len(names)) if ".".join(names[:end]) in columns)
        scalar = columns[".".join(names[:start])][position]
        for name in names[start:]:
            if not scalar.is_valid:
                break
            scalar = scalar[name]
    return scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar


def _value(scalar: Any, notes: set[str]) -> Any:
    """Converts an Arrow scalar to JSON values and adds each kind of repair to `notes`.

    Raises ValueError, OverflowError, TypeError or ArrowException for a value that cannot be converted.
    """
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.DictionaryScalar):
        return _value(scalar.value, notes)
    if isinstance(scalar, pa.MapScalar):
        pairs = [[_value(pair["key"], notes), _value(pair["value"], notes)] for pair in scalar.values]
        names = {key for key, _ in pairs if isinstance(key, str)}
        return dict(pairs) if len(names) == len(pairs) else pairs
    if isinstance(scalar, pa.ListScalar):  # includes large and fixed-size lists
        return [_value(item, notes) for item in scalar.values]
    if isinstance(scalar, pa.StructScalar):
        return {field.name: _value(scalar[number], notes) for number, field in enumerate(scalar.type)}
    if isinstance(scalar, pa.StringScalar):
        return scalar.as_buffer().to_pybytes().decode("utf-8", "replace")
    if pa.types.is_timestamp(scalar.type) or pa.types.is_time64(scalar.type):  # Python's types have no nanoseconds
        with contextlib.suppress(pa.ArrowException):  # of a time zone that is unknown here
            if not (shown := scalar.cast(pa.string()).as_py()).startswith(_OUT_OF_RANGE):
                return shown
        return f"{scalar.value} {scalar.type.unit}"
    if pa.types.is_duration(scalar.type):
        return f"{scalar.value} {scalar.type.unit}"
    try:
        return plain(scalar.as_py(), notes)
    except (ValueError, OverflowError):  # a date beyond the year 9999
        return str(scalar.value)
