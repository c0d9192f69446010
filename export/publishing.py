"""Publishes a folder whole or not at all, and recognizes one that is up to date.

A folder is written as `.NAME.partial` beside its final path and renamed once it is verified. `trivium_export.json` in
it records what it was made from and the checksum of every file, so that a rerun can skip an unchanged export.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.files import file_sha256, sync, write_atomic
from configs.folders import check_writable
from configs.loader import ConfigError

RECORD = "trivium_export.json"
CARD = "README.md"


def check_target(out: Path, mend: bool = True) -> None:
    """Raises ConfigError if `out` exists and is not an export; with `mend`, restores an interrupted one first."""
    previous = _previous(out)
    if mend and previous.is_dir() and not out.exists():
        previous.rename(out)
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / RECORD).is_file())):
        raise ConfigError(
            f"out = {out} exists and was not written by `trivium export`; choose another folder, or remove it"
        )


@contextlib.contextmanager
def partly_written(out: Path, key: str) -> Iterator[Path]:
    """Yields an empty folder beside `out` to write into; the remains of an interrupted export are removed first.

    At the end the folder is removed unless it was published (renamed), with folders above it that were made for it and
    are empty. Raises ConfigError, naming `key` and its value `out`, if nothing can be written there.
    """
    check_writable(out.parent, key, out)
    partial = out.with_name(f".{out.name}.partial")
    made = [folder for folder in partial.parents if not folder.exists()]
    discard(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        discard(partial)
        with contextlib.suppress(OSError):  # not empty if it was published
            for folder in made:
                folder.rmdir()


def discard(partial: Path) -> None:
    """Removes a folder if it exists."""
    shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, out: Path, record: dict[str, Any]) -> None:
    """Writes `record` with checksums into `partial` and renames it to `out`, replacing an older export.

    Files that others have put into the older one, such as results of `trivium eval`, are in the new one too.
    """
    written = [file for file in sorted(partial.rglob("*")) if file.is_file()]
    files = {file.relative_to(partial).as_posix(): file_sha256(file) for file in written}
    write_atomic(partial / RECORD, (json.dumps(record | {"files": files}, indent=2) + "\n").encode())
    for file in _of_others(out):
        if not (kept := partial / file.relative_to(out)).exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, kept)
    for file in (*partial.rglob("*"), partial):
        sync(file)
    previous = _previous(out)
    discard(previous)
    if out.exists():
        out.rename(previous)
    partial.rename(out)
    sync(out.parent)
    discard(previous)


def _of_others(out: Path) -> list[Path]:
    """Returns the files in an export that it did not write itself; none if its record is damaged."""
    try:
        own = {RECORD, *json.loads((out / RECORD).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [file for file in sorted(out.rglob("*")) if file.is_file() and file.relative_to(out).as_posix() not in own]


def is_current(out: Path, made_from: dict[str, Any]) -> bool:
    """Whether `out` is complete and undamaged and was made from `made_from`."""
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        files = record["files"]
        return record["made_from"] == made_from and all(file_sha256(out / name) == files[name] for name in files)
    except (OSError, ValueError, KeyError):
        return False


def check_export(folder: Path, largest: float | None = math.inf) -> None:
    """Raises ConfigError if a file of a folder that Trivium exported is missing or another one; the card may be.

    The folder may be that of the adapter in an export. Files of tensors are left out if they have more than `largest`
    bytes together, or if that is None. Nothing is known of folders that Trivium did not write.
    """
    record, prefix = folder / RECORD, ""
    if not record.is_file():
        record, prefix = folder.parent / RECORD, f"{folder.name}/"
    if not record.is_file():
        return
    meant = f"if a change of the folder is meant, remove {record}"
    try:
        files = dict(json.loads(record.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError) as error:
        fault = error if isinstance(error, ValueError) else "it names no files"
        raise ConfigError(f"{record} is damaged ({fault}); export the model again; {meant}") from None
    own = {name.removeprefix(prefix): sha256 for name, sha256 in files.items() if name.startswith(prefix)}
    compared = {folder / name: sha256 for name, sha256 in own.items() if name != CARD and "/" not in name}
    tensors = [file for file in compared if file.suffix == ".safetensors"]
    size = sum(file.stat().st_size for file in tensors if file.is_file())
    if largest is None or size > largest:
        compared = {file: sha256 for file, sha256 in compared.items() if file not in tensors}
    for file, sha256 in compared.items():
        if not file.is_file():
            raise ConfigError(f"{file} is missing; export the model again; {meant}")
        if file_sha256(file) != sha256:
            raise ConfigError(
                f"{file} is not the one that {folder} was exported with; restore that one, or export the model again; "
                f"{meant}"
            )


def exported_weights(folder: Path) -> str | None:
    """Returns the hash of the model that a folder was exported from, None if it is no export of Trivium."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return str(record["made_from"]["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _previous(out: Path) -> Path:
    return out.with_name(f".{out.name}.previous")
