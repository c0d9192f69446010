"""Check that a source's configured keys exist in the first records of a few of its files, before all files are read.

A wrong `text_key` would lose every record, and a wrong `id_key` or `url_key` would go unnoticed. Only jsonl and parquet
sources are checked. Anything else that is wrong with a file is reported when the file is read.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from configs.loader import ConfigError
from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.personal_data.hiding import hide
from data_pipeline.reading.charsets import wide_charset
from data_pipeline.reading.decompression import Fault, claimed_compression, members
from data_pipeline.reading.fields import lookup
from data_pipeline.reading.input_records import FoundFile, InputUnit
from data_pipeline.reading.jsonl import parse
from data_pipeline.reading.line_splitter import LineSplitter
from data_pipeline.reading.parquet import leaves_of
from data_pipeline.reading.source_files import open_file

_FILES = 8  # files of a source that are looked at: the first and others evenly spread over the list
_RECORDS = 1000  # records of each file that are looked at, in at most _BYTES bytes
_BYTES = 1 << 23
_SHOWN = 20  # most keys that a message lists
_PURPOSE = {
    "text_key": "that holds the text",
    "id_key": "that holds the id, or remove id_key from the config",
    "url_key": "that holds the URL, or remove url_key from the config",
    "metadata_key": "that holds an object of metadata, or remove metadata_key from the config",
}


def _of_source(name: str, key: str) -> str:
    return f"sources.{name}.{key}"


def check_keys(
    units: Sequence[InputUnit], limits: ExtractConfig, spelled: Callable[[str, str], str] = _of_source
) -> None:
    """Raises ConfigError for a configured key that no record has, or a text key under which no value is text.

    `spelled` returns how the user gives a source's key.
    """
    files: dict[str, list[FoundFile]] = {}
    configs: dict[str, SourceConfig] = {}
    for unit in units:
        if unit.config.format in ("jsonl", "parquet"):
            configs[unit.source] = unit.config
            files.setdefault(unit.source, []).extend(file for file in unit.files if not file.reason and file.size)
    for name, source in configs.items():
        _check(partial(spelled, name), source, _spread(files[name]), limits)


def _spread(files: Sequence[FoundFile]) -> list[FoundFile]:
    """Returns at most `_FILES` files, evenly spread over the list."""
    step = max(1, len(files) / _FILES)
    return [files[int(number * step)] for number in range(min(_FILES, len(files)))]


def _wanted(source: SourceConfig) -> list[tuple[str, str]]:
    """Returns (config key, record key) of each key that has to exist: the text key and all that the config sets.

    Keys other than the text key may be absent from records as long as they have their default names.
    """
    chosen = [("text_key", source.text_key)]
    for key in ("id_key", "url_key", "metadata_key"):
        if getattr(source, key) != SourceConfig.model_fields[key].default:
            chosen.append((key, getattr(source, key)))
    return chosen + [("fields", field) for field in source.fields if source.fields != "all"]


def _check(
    spelled: Callable[[str], str], source: SourceConfig, files: Sequence[FoundFile], limits: ExtractConfig
) -> None:
    """Raises ConfigError for the first key of a source that no record of `files` has."""
    missing, there, looked_at = _wanted(source), dict[str, None](), 0
    objects = dict[str, None]()  # keys that hold an object
    kinds: set[str] = set()  # kinds of values under the text key that are not text
    for file in files:
        with contextlib.suppress(Exception):  # the reader of the file reports what is wrong with it
            for fields in _first(file, source, limits):
                looked_at += 1
                there |= dict.fromkeys(_keys(fields))
                objects |= dict.fromkeys(name for name, value in fields.items() if isinstance(value, dict))
                missing = [(key, wanted) for key, wanted in missing if not _has(fields, key, wanted, kinds)]
                if not missing:
                    return
    if not looked_at:
        return
    key, wanted = missing[0]
    others = f" and {len(files) - 1} other files" if len(files) > 1 else ""
    listed = objects if key == "metadata_key" and objects else there
    shown = ", ".join(hide(one) for one in islice(listed, _SHOWN)) + (", ..." if len(listed) > _SHOWN else "")
    if key == "text_key" and kinds:
        raise ConfigError(
            f"{spelled(key)} = {wanted!r} holds no text but {' and '.join(sorted(kinds))} in {files[0].path}"
            f"{others}; the keys there are {shown}; name the one that holds the text"
        )
    purpose = _PURPOSE.get(key, 'that is meant, or set fields = "all"')
    setting = f"has {wanted!r}" if key == "fields" else f"= {wanted!r}"
    raise ConfigError(
        f"{spelled(key)} {setting}, but none of the first {looked_at:,} records in {files[0].path}{others} has "
        f"this key; the {'objects' if listed is objects else 'keys'} there are {shown}; name the one {purpose}"
    )


def _has(fields: dict[str, Any], key: str, wanted: str, kinds: set[str]) -> bool:
    """Whether a record has the key `wanted`, with text if `key` is the text key; else notes the kind of its value."""
    if not (slot := lookup(fields, wanted)):
        return False
    value = slot[0][slot[1]]
    if key == "text_key" and not isinstance(value, str):
        if value is not None:
            kinds.add(_KINDS.get(type(value), "numbers"))
        return False
    return True


_KINDS: dict[type, str] = {list: "lists", dict: "objects", bool: "booleans"}


def _first(file: FoundFile, source: SourceConfig, limits: ExtractConfig) -> Iterator[dict[str, Any]]:
    """Yields a jsonl file's first records, or one made-up record with the schema of a parquet file."""
    with open_file(file.path) as content:
        if source.format == "parquet":
            metadata = pq.read_metadata(content)
            if metadata.num_rows:
                yield _fields_of(metadata)
            return
        splitter = LineSplitter(limits.max_record_bytes, recognize=wide_charset)
        size, found = 0, 0
        for item in members(content, limits, lambda _: None, claimed_compression(file.path)):
            for block in item.blocks() if not isinstance(item, Fault) else ():
                size += len(block)
                for line in splitter.feed(block):
                    for fields in _parsed(line.content):
                        found += 1
                        yield fields
                if size > _BYTES or found >= _RECORDS:
                    return
        for line in splitter.close():
            yield from _parsed(line.content)


def _parsed(line: bytes) -> Iterator[dict[str, Any]]:
    """Yields the object on a line, or nothing if the line is no JSON object."""
    with contextlib.suppress(ValueError, RecursionError):
        fields = parse(line.removeprefix(b"\xef\xbb\xbf"), set())
        if isinstance(fields, dict):
            yield fields


def _fields_of(metadata: pq.FileMetaData) -> dict[str, Any]:
    """Returns an object with the keys of a parquet schema: "" for columns of strings or bytes, [] for lists, else 0."""
    fields: dict[str, Any] = {}
    schema = metadata.schema.to_arrow_schema()
    for number, leaf in enumerate(leaves_of(metadata)):
        column = metadata.schema.column(number)
        is_text = "BYTE_ARRAY" in column.physical_type and column.logical_type.type != "DECIMAL"
        inner = fields
        path = leaf.split(".list.")[0].split(".key_value.")[0] if column.max_repetition_level else leaf
        *outer, last = [path] if path in schema.names else path.split(".")
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = [] if column.max_repetition_level else "" if is_text else 0
    return fields


def _keys(fields: dict[str, Any]) -> Iterator[str]:
    """Yields the keys of a record; those of an object inside it as a.b."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in value)
        else:
            yield name
