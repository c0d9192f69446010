"""Whether a source's keys are there: a look at the first records of a few of its files, before all are read.

A wrong `text_key` would cost every record, and a wrong `id_key` or `url_key` nobody would notice. Of jsonl and parquet
alone; what is wrong with a file otherwise is left to those who read it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from configs.loader import ConfigError
from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.personal_data.hiding import hide
from data_pipeline.reading.decompression import Fault, claimed_compression, members
from data_pipeline.reading.fields import lookup
from data_pipeline.reading.files import open_file
from data_pipeline.reading.jsonl import LineSplitter, parse
from data_pipeline.reading.parquet import leaves_of
from data_pipeline.reading.records import FoundFile, InputUnit

_FILES = 8  # of a source, the first and others as far apart as there are
_RECORDS = 1000  # of a file, and no more than these bytes
_BYTES = 1 << 23
_SHOWN = 20  # keys in a message
_PURPOSE = {
    "text_key": "that holds the text",
    "id_key": "that holds the id, or leave it out",
    "url_key": "that holds the address, or leave it out",
    "metadata_key": "that holds an object to carry along, or leave it out",
}


def check_keys(units: Sequence[InputUnit], limits: ExtractConfig) -> None:
    """Errors: ConfigError for a key that no record has, or a text key under which nothing is text."""
    files: dict[str, list[FoundFile]] = {}
    configs: dict[str, SourceConfig] = {}
    for unit in units:
        if unit.config.format in ("jsonl", "parquet"):
            configs[unit.source] = unit.config
            files.setdefault(unit.source, []).extend(file for file in unit.files if not file.reason and file.size)
    for name, source in configs.items():
        _check(name, source, _spread(files[name]), limits)


def _spread(files: Sequence[FoundFile]) -> list[FoundFile]:
    step = max(1, len(files) / _FILES)
    return [files[int(number * step)] for number in range(min(_FILES, len(files)))]


def _wanted(source: SourceConfig) -> list[tuple[str, str]]:
    """(key of the config, key of a record) of those that somebody chose; defaults may be absent, but not the text's."""
    chosen = [("text_key", source.text_key)]
    for key in ("id_key", "url_key", "metadata_key"):
        if getattr(source, key) != SourceConfig.model_fields[key].default:
            chosen.append((key, getattr(source, key)))
    return chosen + [("fields", field) for field in source.fields if source.fields != "all"]


def _check(name: str, source: SourceConfig, files: Sequence[FoundFile], limits: ExtractConfig) -> None:
    missing, there, looked_at = _wanted(source), dict[str, None](), 0
    kinds: set[str] = set()  # of what is under the text key, if it is no text
    for file in files:
        with contextlib.suppress(Exception):  # those who read the file say what is wrong with it
            for fields in _first(file, source, limits):
                looked_at += 1
                there |= dict.fromkeys(_keys(fields))
                missing = [(key, wanted) for key, wanted in missing if not _has(fields, key, wanted, kinds)]
                if not missing:
                    return
    if not looked_at:
        return
    key, wanted = missing[0]
    others = f" or in {len(files) - 1} other files" if len(files) > 1 else ""
    shown = ", ".join(hide(one) for one in islice(there, _SHOWN)) + (", ..." if len(there) > _SHOWN else "")
    if key == "text_key" and kinds:
        raise ConfigError(
            f"sources.{name}.text_key = {wanted!r} holds no text but {' and '.join(sorted(kinds))} in {files[0].path}"
            f"{others}; the keys there are {shown}; name the one that holds the text"
        )
    purpose = _PURPOSE.get(key, 'that is meant, or take "all"')
    said = f"has {wanted!r}, which" if key == "fields" else f"= {wanted!r}:"
    raise ConfigError(
        f"sources.{name}.{key} {said} no record has among the first {looked_at:,} in {files[0].path}{others}; the keys "
        f"there are {shown}; name the one {purpose}"
    )


def _has(fields: dict[str, Any], key: str, wanted: str, kinds: set[str]) -> bool:
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
    """The first records of a file; of parquet one, with text where its schema has text."""
    with open_file(file.path) as content:
        if source.format == "parquet":
            metadata = pq.read_metadata(content)
            if metadata.num_rows:
                yield _fields_of(metadata)
            return
        splitter, size, found = LineSplitter(limits.max_record_bytes), 0, 0
        for item in members(content, limits, lambda _: None, claimed_compression(file.path)):
            for block in item.blocks() if not isinstance(item, Fault) else ():
                size += len(block)
                for line in splitter.feed(block):
                    for fields in _parsed(line.content):
                        found += 1
                        yield fields
                if size > _BYTES or found >= _RECORDS:
                    return
        yield from _parsed(splitter.close().content)


def _parsed(line: bytes) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(ValueError, RecursionError):
        fields = parse(line.removeprefix(b"\xef\xbb\xbf"), set())
        if isinstance(fields, dict):
            yield fields


def _fields_of(metadata: pq.FileMetaData) -> dict[str, Any]:
    """An object of the schema's shape, with a text in each column of texts or bytes, and 0 in others."""
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
    """Names of fields, and of those in objects, as a.b."""
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from (f"{name}.{inner}" for inner in value)
        else:
            yield name
