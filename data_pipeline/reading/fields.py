"""Conversion of a JSON line's or parquet row's fields to a record: its text, id, URL, metadata and other fields.

A key may lead into nested objects, as `a.b`; a field whose own name is "a.b" takes precedence. Fields other than text,
id, URL and metadata are kept under `fields` if `SourceConfig.fields` names them. All values become JSON values: dates,
decimals, UUIDs and integers beyond 64 bits become strings, and so do NaN and the infinities. A lone half of a surrogate
pair, which UTF-8 cannot encode, becomes U+FFFD.
"""

import datetime
import math
from collections.abc import Mapping
from typing import Any

import orjson

from configs.sources import ExtractConfig, SourceConfig
from data_pipeline.reading.input_records import Record

SURROGATES = "lone surrogates replaced"
NOT_FINITE = "NaN or Infinity in JSON"
LEFT_OUT = "fields too large to carry"

_LARGEST, _SMALLEST = (1 << 64) - 1, -(1 << 63)  # integers that orjson can write
_DEPTH = 8  # levels of objects that enclose a record's metadata in any file that the pipeline writes


def lookup(fields: dict[str, Any], key: str) -> tuple[dict[str, Any], str] | None:
    """Returns the object that holds `key` and the key's name in that object, or None if no object holds it."""
    if key in fields:
        return fields, key
    slot = key.find(".")
    while slot >= 0:
        inner = fields.get(key[:slot])
        if isinstance(inner, dict) and (found := lookup(inner, key[slot + 1 :])):
            return found
        slot = key.find(".", slot + 1)
    return None


def fill(record: Record, fields: dict[str, Any], source: SourceConfig, limits: ExtractConfig) -> None:
    """Sets text, id, URL and metadata of `record`, or the reason why it has no text; may remove them from `fields`."""
    slots = {key: lookup(fields, key) for key in (source.text_key, source.id_key, source.url_key, source.metadata_key)}
    found = {key: slot and slot[0][slot[1]] for key, slot in slots.items()}
    text, own, url, inner = (
        found[key] for key in (source.text_key, source.id_key, source.url_key, source.metadata_key)
    )
    used = {source.text_key}
    if isinstance(own, str | int | float) and not isinstance(own, bool):
        record.id = str(own)
        used.add(source.id_key)
    if text is None:
        record.reason = "missing_text"
    elif not isinstance(text, str):
        record.reason = "text_not_a_string"
    elif not text.strip():
        record.reason = "empty"
    else:
        record.text = text
    if isinstance(url, str):
        record.metadata["url"] = url
        used.add(source.url_key)
    if record.reason:
        return
    if isinstance(inner, dict):
        used.add(source.metadata_key)
        if _can_be_written(inner):
            record.metadata["record"] = inner
        else:
            record.notes.add(LEFT_OUT)
    listed = source.fields if source.fields != "all" else None
    wanted = _listed(fields, listed) if listed is not None else _others(fields, [slots[key] for key in used], used)
    carried = _within(wanted, limits.max_fields_bytes)
    if carried:
        record.metadata["fields"] = carried
    if len(carried) < len(wanted):
        record.notes.add(LEFT_OUT)


def _listed(fields: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    slots = {key: lookup(fields, key) for key in keys}
    return {key: value for key, slot in slots.items() if slot and (value := slot[0][slot[1]]) is not None}


def _others(fields: dict[str, Any], slots: list[Any], used: set[str]) -> dict[str, Any]:
    """Returns all fields but those at `slots`, and but nulls and objects that are empty once `slots` are removed."""
    for slot in slots:
        if slot:
            slot[0].pop(slot[1], None)
    nested = {key.split(".")[0] for key in used}
    emptied = {name for name in nested if fields.get(name) == {}}
    return {name: value for name, value in fields.items() if value is not None and name not in emptied}


def _within(fields: dict[str, Any], most: int) -> dict[str, Any]:
    """Returns the fields that together fit into `most` bytes of JSON, taken in their order."""
    kept, size = {}, 0
    for name, value in fields.items():
        content = _json(value)
        if content is not None and size + len(name) + len(content) <= most:
            kept[name] = value
            size += len(name) + len(content)
    return kept


def _can_be_written(value: Any) -> bool:
    return _json(value) is not None


def _json(value: Any) -> bytes | None:
    """Returns `value` as JSON, or None if it is nested too deeply to be written inside a record's metadata."""
    for _ in range(_DEPTH):
        value = [value]
    try:
        return orjson.dumps(value)[_DEPTH:-_DEPTH]
    except TypeError:
        return None


def plain(value: Any, notes: set[str]) -> Any:
    """Converts `value` to JSON values and adds each kind of repair to `notes`.

    Raises RecursionError if it is nested too deeply.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return whole(value, notes)
    if isinstance(value, int):
        return value if _SMALLEST <= value <= _LARGEST else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    if isinstance(value, bytes):
        return _of_bytes(value)
    if isinstance(value, Mapping):
        return {whole(str(name), notes): plain(inner, notes) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, notes) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return whole(str(value), notes)


def whole(text: str, notes: set[str]) -> str:
    """Returns `text` with surrogate pairs joined to one character each, and U+FFFD for lone surrogates."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if joined.count("\ufffd") > text.count("\ufffd"):
            notes.add(SURROGATES)
        return joined


def _of_bytes(content: bytes) -> str:
    """Decodes bytes that are printable UTF-8; writes all others in hexadecimal digits."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content.hex()
    return text if all(sign.isprintable() or sign.isspace() for sign in text) else content.hex()
