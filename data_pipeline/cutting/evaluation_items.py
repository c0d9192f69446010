"""Reads evaluation files, whose items must not be trained on.

Files are JSON lines or text, in UTF-8, UTF-16 or UTF-32, plain or compressed with gzip or Zstandard, or Parquet.
Compression, encoding and Parquet are recognized by a file's first bytes. An item that cannot be read ends the run with
an error, since documents that hold its text would otherwise stay. Files may have different text keys, which lead into
nested objects as `a.b`: every item of a file has at least those that the first one has.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from configs.cuts import DecontaminateConfig
from configs.loader import ConfigError
from configs.sources import ExtractConfig
from data_pipeline.reading.charsets import decode_whole, marked_charset
from data_pipeline.reading.fields import lookup
from data_pipeline.reading.jsonl import parse
from data_pipeline.reading.line_splitter import Line
from data_pipeline.reading.names import printable
from data_pipeline.reading.whole_files import NotWhole, whole_content, whole_lines

LIMITS = ExtractConfig()
_PARQUET = b"PAR1"
_BATCH_ROWS = 1000


class EvaluationItem(NamedTuple):
    """One question, problem or passage of an evaluation file, and the keys that its text is from."""

    file: str
    id: str
    text: str
    keys: Sequence[str] = ()


def read_items(paths: Sequence[str], settings: DecontaminateConfig) -> Iterator[EvaluationItem]:
    """Yields the items of all files. Raises ValueError, with file and line or row, if one cannot be read."""
    for path in paths:
        count = 0
        for item in _items(path, settings):
            count += 1
            yield item
        if not count:
            raise ValueError(f"evaluation file {printable(path)} holds no items; replace it, or leave it out")


def check_first_items(paths: Sequence[str], settings: DecontaminateConfig) -> None:
    """Reads the first item of each file, before any work is done.

    Raises ConfigError if one cannot be read, or for a text key that none of them has.
    """
    missing = [] if settings.format == "text" else list(settings.text_keys)
    for path in paths:
        try:
            item = next(read_items([path], settings))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        missing = [key for key in missing if key not in item.keys]
    if missing:
        raise ConfigError(
            f"decontaminate.text_keys has {missing[0]!r}, which the first item of no evaluation file has; correct it, "
            "or leave it out"
        )


def _items(path: str, settings: DecontaminateConfig) -> Iterator[EvaluationItem]:
    name = printable(path)
    with open(path, "rb") as file:
        is_parquet = file.read(len(_PARQUET)) == _PARQUET
        file.seek(0)
        if settings.format == "text":
            yield EvaluationItem(name, Path(name).name, _text(file, name))
        elif is_parquet:
            yield from _rows(path, name, settings)
        elif settings.format == "parquet":
            raise ValueError(
                f'evaluation file {name} is no Parquet file; set decontaminate.format to "jsonl", or to "text" if '
                "all of a file is one text"
            )
        else:
            keys: list[str] = []
            for line in _lines(file, name):
                if line.too_long or line.content.strip():
                    fields, where = _fields(line, name), f"line {line.number}"
                    keys = keys or _keys_of(name, where, fields, settings)
                    yield _item(name, where, line.number, fields, keys, settings)


def _content(file: BinaryIO, name: str) -> Iterator[bytes]:
    try:
        yield from whole_content(file, name, LIMITS)
    except NotWhole as error:
        raise _damaged(name, error) from None


def _damaged(name: str, error: NotWhole) -> ValueError:
    return ValueError(
        f"evaluation file {name} cannot be read to its end ({error}); replace it by a whole copy, or leave it out of "
        "decontaminate.files"
    )


def _text(file: BinaryIO, name: str) -> str:
    content = b"".join(_content(file, name))
    try:
        return decode_whole(content, marked_charset(content) or "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"evaluation file {name} is not valid {error.encoding} at byte {error.start}; convert it to UTF-8"
        ) from None


def _lines(file: BinaryIO, name: str) -> Iterator[Line]:
    try:
        yield from whole_lines(file, name, LIMITS)
    except NotWhole as error:
        raise _damaged(name, error) from None


def _fields(line: Line, name: str) -> Any:
    if line.too_long:
        raise ValueError(
            f"evaluation file {name}, line {line.number}: it has {line.size:,} bytes, which is too long; split its "
            "text into several lines"
        )
    try:
        fields = parse(line.content.removeprefix("\ufeff".encode()), set())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"evaluation file {name}, line {line.number}: it is not valid utf-8 at byte {error.start} of the line; "
            "convert the file to UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"evaluation file {name}, line {line.number}: {error}; repair it, or set decontaminate.format to "
            '"text" if the file holds one text and not JSON lines'
        ) from None
    if isinstance(fields, list):
        raise ValueError(f"evaluation file {name}, line {line.number}: it is a list; give each of its items a line")
    return fields


def _rows(path: str, name: str, settings: DecontaminateConfig) -> Iterator[EvaluationItem]:
    number = 0
    try:
        table = pq.ParquetFile(path)
        names = table.schema_arrow.names
        asked = (*settings.text_keys, settings.id_key)
        # A file without any of the columns is read whole, so that the error can say which ones hold texts.
        columns = [column for column in names if any(f"{key}.".startswith(f"{column}.") for key in asked)] or None
        keys: list[str] = []
        for batch in table.iter_batches(_BATCH_ROWS, columns=columns):
            for fields in batch.to_pylist():
                number += 1
                keys = keys or _keys_of(name, f"row {number}", fields, settings)
                yield _item(name, f"row {number}", number, fields, keys, settings)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"evaluation file {name} cannot be read after row {number} ({error}); replace it by a whole copy, or leave "
            "it out of decontaminate.files"
        ) from None


def _keys_of(name: str, where: str, fields: Any, settings: DecontaminateConfig) -> list[str]:
    """Returns the text keys that a file's first item has, which all of its items have to have; they may have more.

    Raises ValueError if it has none.
    """
    found = {key: lookup(dict(fields), key) for key in settings.text_keys} if isinstance(fields, Mapping) else {}
    keys = [key for key, slot in found.items() if slot and slot[0][slot[1]] is not None]
    if not keys:
        raise _no_texts(name, where, fields, " or ".join(map(repr, settings.text_keys)))
    return keys


def _item(
    name: str, where: str, number: int, fields: Any, needed: Sequence[str], settings: DecontaminateConfig
) -> EvaluationItem:
    parts: list[str] = []
    keys: list[str] = []
    for key in settings.text_keys:
        slot = lookup(fields, key) if isinstance(fields, dict) else None
        value = slot[0][slot[1]] if slot else None
        if value is None and key not in needed:
            continue
        keys.append(key)
        texts: list[Any] = value if isinstance(value, list) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise _no_texts(name, where, fields, repr(key))
        parts.extend(texts)
    own = lookup(fields, settings.id_key)
    named = own[0][own[1]] if own else None
    return EvaluationItem(name, str(number if named is None else named), "\n".join(parts), keys)


def _no_texts(name: str, where: str, fields: Any, keys: str) -> ValueError:
    if isinstance(fields, Mapping):
        found = list(_keys_of_texts(fields))
        there = f": this one has {', '.join(map(printable, found))}" if found else ": this one has none"
    else:
        there = ", in a file with an object on each line"
    return ValueError(
        f"evaluation file {name}, {where}: expected a string, or a list of strings, under {keys}; set "
        f"decontaminate.text_keys to the keys that hold its texts{there}"
    )


def _keys_of_texts(fields: Mapping[str, Any]) -> Iterator[str]:
    """Yields the keys that hold strings; those of an object inside as a.b."""
    for key, value in fields.items():
        parts = value if isinstance(value, list) else [value]
        if isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in _keys_of_texts(value))
        elif parts and all(isinstance(part, str) for part in parts):
            yield key
