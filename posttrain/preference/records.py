"""Reads records of post-training data from JSON lines and parquet, and sets aside those that cannot be used.

A record that is set aside is counted under its reason, and the first of each reason is named. Records are split into
training and held-out ones by a hash of their prompt, so that two records of one prompt are never on both sides.
"""

import gzip
import hashlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

SHOWN = 160  # characters of a broken record's details in messages
TOO_LONG = "too_long"


class Unusable(Exception):
    """A record that is not used: the reason, details of this one, and its number of tokens if it has too many."""

    def __init__(self, reason: str, details: str = "", tokens: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.details, self.tokens = reason, details, tokens


@dataclass
class Records(Generic[T]):
    """Usable records by split, and counts of the others by reason.

    `first_of_reason` has file, line and details of the first record of each reason. `longest` is the number of tokens
    of the longest record that is too long, 0 if none is.
    """

    kind: str  # what a record is, for messages: "pairs", for example
    train: list[T] = field(default_factory=list)
    heldout: list[T] = field(default_factory=list)
    set_aside: Counter[str] = field(default_factory=Counter)
    first_of_reason: dict[str, str] = field(default_factory=dict)
    longest: int = 0

    def __str__(self) -> str:
        return f"{len(self.train)} to train on, {len(self.heldout)} held out, set aside: {self.reasons or 'none'}"

    @property
    def total(self) -> int:
        """Number of all records, those that were set aside too."""
        return len(self.train) + len(self.heldout) + self.set_aside.total()

    @property
    def reasons(self) -> str:
        """The counts by reason, as text, with the first record of each."""
        return ", ".join(
            f"{count} {reason} (first: {self.first_of_reason[reason]})"
            for reason, count in sorted(self.set_aside.items())
        )


def read_records(
    paths: Sequence[str],
    key: str,
    kind: str,
    parse: Callable[[str, dict[str, Any]], tuple[T, str]],
    heldout_share: float,
    max_bad_share: float,
    parts: int = 1,
) -> Records[T]:
    """Reads all records of the files that config key `key` names, and splits them.

    `parse` gets a record's place and its values, and returns what is kept of it and its prompt, or raises Unusable.
    Messages suggest values of train.seq_length that are multiples of `parts`; where that is 0, the run continues and
    keeps the length of its rows. Raises ValueError if a file is missing or damaged, if more than `max_bad_share` of the
    records are set aside, or if none is left to train on.
    """
    found: Records[T] = Records(kind)
    for place, raw in raw_records(paths, key):
        try:
            kept, prompt = parse(place, _parsed(raw))
        except Unusable as broken:
            found.set_aside[broken.reason] += 1
            details = broken.details and f", {broken.details[:SHOWN]}"
            found.first_of_reason.setdefault(broken.reason, f"{place}{details}")
            found.longest = max(found.longest, broken.tokens)
            continue
        (found.heldout if _fraction(prompt) < heldout_share else found.train).append(kept)
    _check(found, ", ".join(paths), key, heldout_share, max_bad_share, parts)
    return found


def _check(found: Records[Any], where: str, key: str, heldout_share: float, max_bad_share: float, parts: int) -> None:
    """Raises ValueError, with a remedy, if too many records were set aside or none is left to train on."""
    bad, total, kind = found.set_aside.total(), found.total, found.kind
    if not total:
        raise ValueError(f"{key}: {where} has no {kind}; name files with one on each line")
    unit = math.lcm(8, parts or 1)
    needed, fits = -(-found.longest // unit) * unit, ""
    if found.longest and bad - found.set_aside[TOO_LONG] <= max_bad_share * total:
        fits = f", or set train.seq_length={needed}, which takes the longest"
        if not parts:
            fits = f", or choose another run.dir for a run with train.seq_length={needed}"
    if bad > max_bad_share * total:
        raise ValueError(
            f"{bad} of {total} {kind} were set aside, more than data.max_bad_share = {max_bad_share}: {found.reasons}; "
            f"correct or remove them{fits}"
        )
    if not found.train and not found.heldout:
        raise ValueError(f"all {total} {kind} of {where} were set aside: {found.reasons}; correct them{fits}")
    if not found.train:
        raise ValueError(
            f"all {len(found.heldout)} usable {kind} of {where} are held out; lower data.heldout_share = "
            f"{heldout_share}, or add {kind} with other prompts"
        )


def raw_records(paths: Sequence[str], key: str) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """Yields the place of each record, and its line or, from parquet, its values."""
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{key} names {path}, which is no file; `ls {Path(path).parent}` shows what is there")
        try:
            yield from _rows_of_parquet(path) if path.endswith(".parquet") else _lines(path)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} in {key} cannot be read to its end ({error}); restore it") from None


def _lines(path: str) -> Iterator[tuple[str, bytes]]:
    with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def _rows_of_parquet(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


def _parsed(raw: bytes | dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a record; those that are null are left out."""
    record: Any = raw
    if isinstance(raw, bytes):
        try:
            record = json.loads(raw)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise Unusable("bad_json", str(error)) from None
    if not isinstance(record, dict):
        raise Unusable("no_object", f"it is {type(record).__name__}")
    return {name: value for name, value in record.items() if value is not None}


def needed(record: dict[str, Any], key: str) -> Any:
    """Returns the value of a key that a record must have."""
    if key not in record:
        keys = ", ".join(map(repr, list(record)[:8]))
        raise Unusable(f"no_{key}", f"its keys are {keys}" if keys else "it has no keys")
    return record[key]


def _fraction(prompt: str) -> float:
    return int.from_bytes(hashlib.sha256(prompt.encode(errors="surrogatepass")).digest()[:8], "big") / 2**64
