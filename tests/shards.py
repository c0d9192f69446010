"""Writes shards of given texts in the format that stages publish."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import zstandard


def write_shard(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    lines = (orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.compress(b"".join(lines)))
    return path
