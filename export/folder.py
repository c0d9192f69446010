"""Publishing a folder whole or not at all, and knowing an earlier one again.

A folder is written as `.NAME.partial` beside its place, and renamed once it is proven. `trivium_export.json`
in it records what it was made from and the checksum of every file, so that a rerun can tell that nothing
changed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from configs.folders import make_writable
from configs.loader import ConfigError, file_sha256, sync, write_atomic

RECORD = "trivium_export.json"


def check_place(out: Path, mend: bool = True) -> None:
    """Mends an interrupted publication. Errors: ConfigError when what is at `out` is not an export."""
    previous = _previous(out)
    if mend and previous.is_dir() and not out.exists():
        previous.rename(out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / RECORD).is_file())):
        raise ConfigError(
            f"out = {out} exists and was not written by `trivium export`; name another place or remove it"
        )


def begin(out: Path, key: str) -> Path:
    """An empty folder to write into; what an interrupted export left there is removed.

    Errors: ConfigError naming `key`, whose value `out` is, where nothing can be written.
    """
    make_writable(out.parent, key, out)
    partial = out.with_name(f".{out.name}.partial")
    discard(partial)
    partial.mkdir(parents=True)
    return partial


def discard(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, out: Path, record: dict[str, Any]) -> None:
    """Adds the record to `partial` and renames it to `out`, replacing an older export."""
    files = {file.name: file_sha256(file) for file in sorted(partial.iterdir())}
    write_atomic(partial / RECORD, (json.dumps(record | {"files": files}, indent=2) + "\n").encode())
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    previous = _previous(out)
    discard(previous)
    if out.exists():
        out.rename(previous)
    partial.rename(out)
    sync(out.parent)
    discard(previous)


def is_current(out: Path, made_from: dict[str, Any]) -> bool:
    """Whether `out` is whole and was made from just this."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        files = record["files"]
        return record["made_from"] == made_from and all(file_sha256(out / name) == files[name] for name in files)
    except (OSError, ValueError, KeyError):
        return False


def _previous(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous")
