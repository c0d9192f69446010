"""Records of JSON lines (gzipped or not) and parquet files, with where each is, for messages."""

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from configs.loader import ConfigError

NESTED = 8  # keys of a record that messages name


class BrokenRecord(ValueError):
    """A record that cannot be used: `reason`, by which such records are counted, and details of this one."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.reason, self.details = reason, details


def find_files(paths: Sequence[str], key: str) -> list[str]:
    """Returns the files of paths and globs, in order. Raises ConfigError, naming `key`, if one is missing."""
    found: list[str] = []
    for path in paths:
        files = [path] if Path(path).is_file() else sorted(one for one in glob.glob(path) if Path(one).is_file())
        if not files:
            raise ConfigError(f"{key} names {path}, which is no file; `ls {Path(path).parent}` shows what is there")
        found += files
    return found


def read_records(files: Sequence[str], key: str) -> Iterator[tuple[str, Mapping[str, Any] | BrokenRecord]]:
    """Yields (file:line or file:row, record or why it cannot be used).

    Raises ConfigError, naming `key`, if a file cannot be read to its end.
    """
    for path in files:
        try:
            yield from _rows(path) if path.endswith(".parquet") else _lines(path)
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"{path} in {key} cannot be read to its end ({text}); restore it") from None


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """Returns the value at a key, or at a path such as "a.b". Raises BrokenRecord, with the keys there are."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            keys = ", ".join(map(repr, list(value)[:NESTED])) if isinstance(value, Mapping) else ""
            where = f"its keys are {keys}" if keys else "it has no keys"
            raise BrokenRecord(f"no key {path!r}", where)
        value = value[part]
    return value


def _lines(path: str) -> Iterator[tuple[str, Mapping[str, Any] | BrokenRecord]]:
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _parsed(line)


def _parsed(line: bytes) -> Mapping[str, Any] | BrokenRecord:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return BrokenRecord("no JSON", str(error))
    if not isinstance(record, dict):
        return BrokenRecord("the line is no object", f"it is {type(record).__name__}")
    return record


def _rows(path: str) -> Iterator[tuple[str, Mapping[str, Any] | BrokenRecord]]:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
        for record in batch.to_pylist():
            number += 1
            # Dates, decimals and bytes become text, so that what a reward gets is JSON whatever the file's format.
            yield f"{path}:{number}", json.loads(json.dumps(record, default=str))
