"""Reads records of post-training data from JSON lines and parquet, and sets aside those that cannot be used.

A record that is set aside is counted under its reason, and the first of each reason is named. `read_split` also splits
records into training and held-out ones by a hash of their prompt, so that two records of one prompt are never on both
sides.
"""

import base64
import glob
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow
import pyarrow.parquet

from configs.loader import ConfigError
from configs.sources import ExtractConfig
from data_pipeline.reading.whole_files import NotWhole, whole_lines
from posttrain.chat.format_interface import UntrainedEnd
from posttrain.tasks.task import fraction

T = TypeVar("T")

# Records are trusted to be no bombs, and are read whole.
_LIMITS = ExtractConfig(max_record_bytes=1 << 40, max_expansion=1e18, max_expanded_bytes=1 << 60)
SHOWN = 160  # characters of a broken record's details in messages
NESTED = 8  # keys of a record that messages name
TOO_LONG = "too_long"


class Unusable(ValueError):
    """A record that is not used: the reason, details of this one, and its number of tokens if it has too many."""

    def __init__(self, reason: str, details: str = "", tokens: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.details, self.tokens = reason, details, tokens


@dataclass
class UnusedRecords:
    """Counts of unused records by reason; `first` has file, line and details of the first of each reason."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str, details: str = "") -> None:
        """Counts one record."""
        self.counts[reason] += 1
        self.first.setdefault(reason, f"{where}{details and ', ' + details[:SHOWN]}")

    def __str__(self) -> str:
        parts = [f"{count} {reason} (first: {self.first[reason]})" for reason, count in sorted(self.counts.items())]
        return ", ".join(parts)


@dataclass
class Records(Generic[T]):
    """Items that usable records give, by split, and counts of the records that were set aside.

    `longest` is the number of tokens of the longest record that is too long, 0 if none is. `total` is the number of all
    records.
    """

    kind: str  # what a record is, for messages: "pairs", for example
    train: list[T] = field(default_factory=list)
    heldout: list[T] = field(default_factory=list)
    set_aside: UnusedRecords = field(default_factory=UnusedRecords)
    longest: int = 0
    total: int = 0

    def __str__(self) -> str:
        return (
            f"{len(self.train)} to train on, {len(self.heldout)} held out, set aside: {str(self.set_aside) or 'none'}"
        )


class TooManySetAside(ValueError):
    """Error for data of which too many records were set aside, or none is left; `found` are the others."""

    def __init__(self, text: str, found: Records[Any]) -> None:
        super().__init__(text)
        self.found = found


def read_split(
    paths: Sequence[str],
    key: str,
    kind: str,
    parse: Callable[[str, dict[str, Any]], tuple[Sequence[T], str]],
    heldout_share: float,
    max_bad_share: float,
    parts: int = 1,
) -> Records[T]:
    """Reads all records of the files that config key `key` names, and splits them.

    `parse` gets a record's location and its values that are not null, and returns what it gives (one item, mostly) and
    its prompt, or raises Unusable. Messages suggest values of train.seq_length that are multiples of `parts`; where
    that is 0, the run continues and keeps the length of its rows. Raises ConfigError if a file is missing or damaged,
    TooManySetAside if more than `max_bad_share` of the records are set aside or none is left to train on, and
    UntrainedEnd, naming the record, as `Chat.samples` does.
    """
    found: Records[T] = Records(kind)
    for location, record in read_records(find_files(paths, key), key):
        found.total += 1
        try:
            if isinstance(record, Unusable):
                raise record
            kept, prompt = parse(location, {name: value for name, value in record.items() if value is not None})
        except Unusable as broken:
            found.set_aside.add(broken.reason, location, broken.details)
            found.longest = max(found.longest, broken.tokens)
            continue
        except UntrainedEnd as error:
            raise error.at(key, location) from None
        (found.heldout if fraction(prompt) < heldout_share else found.train).extend(kept)
    _check(found, ", ".join(paths), key, heldout_share, max_bad_share, parts)
    return found


def _check(found: Records[Any], where: str, key: str, heldout_share: float, max_bad_share: float, parts: int) -> None:
    """Raises TooManySetAside, with a remedy, if too many records were set aside or none is left to train on."""
    bad, total, kind = found.set_aside.counts.total(), found.total, found.kind
    if not total:
        raise TooManySetAside(f"{key}: {where} has no {kind}; name files with one on each line", found)
    unit = math.lcm(8, parts or 1)
    needed, fits = -(-found.longest // unit) * unit, ""
    if found.longest and bad - found.set_aside.counts[TOO_LONG] <= max_bad_share * total:
        fits = f", or set train.seq_length={needed}, which takes the longest"
        if not parts:
            fits = f", or choose another run.dir for a run with train.seq_length={needed}"
    if bad > max_bad_share * total:
        raise TooManySetAside(
            f"{bad} of {total} {kind} were set aside, more than data.max_bad_share = {max_bad_share}: "
            f"{found.set_aside}; correct or remove them{fits}",
            found,
        )
    if not found.train and not found.heldout:
        raise TooManySetAside(
            f"all {total} {kind} of {where} were set aside: {found.set_aside}; correct them{fits}", found
        )
    if not found.train:
        raise TooManySetAside(
            f"all {len(found.heldout)} usable {kind} of {where} are held out; lower data.heldout_share = "
            f"{heldout_share}, or add {kind} with other prompts",
            found,
        )


def find_files(paths: Sequence[str], key: str) -> list[str]:
    """Returns the files of paths and globs, in order. Raises ConfigError, naming `key`, if one is missing."""
    found: list[str] = []
    for path in paths:
        files = [path] if Path(path).is_file() else sorted(one for one in glob.glob(path) if Path(one).is_file())
        if not files:
            near = next(folder for folder in [*Path(path).parents, Path()] if folder.is_dir())
            raise ConfigError(f"{key} names {path}, which is no file; `ls {near}` shows what is there")
        found += files
    return found


def read_records(files: Sequence[str], key: str) -> Iterator[tuple[str, Mapping[str, Any] | Unusable]]:
    """Yields (file:line or file:row, record or why it cannot be used).

    Raises ConfigError, naming `key`, if a file cannot be read to its end.
    """
    for path in files:
        try:
            yield from _rows(path) if path.endswith(".parquet") else _lines(path)
        except (OSError, NotWhole, pyarrow.ArrowException) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"{path} in {key} cannot be read to its end ({text}); restore it") from None


def needed(record: Mapping[str, Any], key: str) -> Any:
    """Returns the value of a key that a record must have. Raises Unusable, with the keys there are."""
    if key not in record:
        raise Unusable(f"no_{key}", said_keys(record))
    return record[key]


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """Returns the value at a key, or at a path such as "a.b". Raises Unusable, with the keys there are."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise Unusable(f"no key {path!r}", said_keys(value if isinstance(value, Mapping) else {}))
        value = value[part]
    return value


def said_keys(record: Mapping[str, Any]) -> str:
    """Names the first keys of a record, for messages."""
    keys = ", ".join(map(repr, list(record)[:NESTED]))
    return f"its keys are {keys}" if keys else "it has no keys"


def _lines(path: str) -> Iterator[tuple[str, Mapping[str, Any] | Unusable]]:
    with open(path, "rb") as file:
        for line in whole_lines(file, path, _LIMITS):
            if line.content.strip():
                yield f"{path}:{line.number}", _parsed(line.content)


def _parsed(line: bytes) -> Mapping[str, Any] | Unusable:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        said = "it goes on in the next line; write it on one line" if line.strip() in (b"{", b"[") else str(error)
        return Unusable("bad_json", said)
    if not isinstance(record, dict):
        what = "a list; give each of its items a line" if isinstance(record, list) else type(record).__name__
        return Unusable("no_object", f"the line is {what}")
    return record


def _rows(path: str) -> Iterator[tuple[str, Mapping[str, Any] | Unusable]]:
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                # Whatever the file's format, what a reward gets is JSON.
                yield f"{path}:{number}", json.loads(json.dumps(record, default=_as_json))


def _as_json(value: Any) -> Any:
    """Returns dates and decimals as text, and bytes too if they are UTF-8, as columns without a type of text have it.

    Other bytes, of an image for example, become an object, which no prompt can be mistaken for.
    """
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}
