"""Checksums of the files that a data run publishes, and of the values in its manifests.

The task that writes a big file also seals it (`seal`): it writes the file's SHA-256 into a hidden file beside it. The
stage moves that checksum into its manifest, so that the leading process need not read the file again. A manifest also
holds a checksum of its own values, so that a changed digit is noticed. `check_files` compares files with checksums.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.loader import Failure
from configs.sealed import Format, SealError

STAGE_MANIFEST = "stage.json"
FIRST_BYTES = 1_000_000_000  # training data of up to this size is read before all else, which takes a few seconds
_CHUNK = 1 << 20
_NAMED = 3  # damaged files that a message names


class DamagedData(Failure):
    """Raised if a published file is missing or changed; its message names the file and what to do, in one sentence."""


@dataclass(frozen=True)
class Expected:
    """Size in bytes and SHA-256 that a file was written with, None where unknown; `title` names it in messages."""

    path: Path
    title: str
    size: int | None
    sha256: str | None


def file_sha256(path: Path, advance: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> str:
    """SHA-256, in hex, of a file's content; "" if `stop` was set before the end.

    `advance` is called with the number of bytes of each block that was read.
    """
    checksum = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            checksum.update(chunk)
            if advance:
                advance(len(chunk))
            if stop and stop.is_set():
                return ""
    return checksum.hexdigest()


def seal(path: Path, sha256: str | None = None) -> None:
    """Writes a finished file's SHA-256 into a hidden file beside it, the seal; computes it unless it is given."""
    _seal_of(path).write_text(sha256 or file_sha256(path), encoding="ascii")


def unseal(path: Path) -> str:
    """Returns a file's SHA-256, read from its seal, which is then deleted.

    Without a seal, or with one that is older than the file's last change, it is computed from the file.
    """
    seal_file = _seal_of(path)
    if not seal_file.is_file():
        return file_sha256(path)
    is_older = seal_file.stat().st_mtime_ns < path.stat().st_mtime_ns
    found = file_sha256(path) if is_older else seal_file.read_text(encoding="ascii")
    seal_file.unlink()
    return found


def is_seal(path: Path) -> bool:
    """Whether a path has the name of a seal, `.<file name>.sha256`."""
    return path.name.startswith(".") and path.name.endswith(".sha256")


def _seal_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def read_sealed(
    kind: Format, path: Path, has_no_checksum: Callable[[dict[str, Any]], bool] = lambda _: False
) -> dict[str, Any]:
    """Reads the values of a manifest and verifies its checksum of them.

    A manifest for which `has_no_checksum` is true, one that an earlier version wrote, is returned unverified. Raises
    DamagedData if the manifest cannot be read or its values were changed.
    """
    try:
        content = path.read_bytes()
        with contextlib.suppress(ValueError):
            values = json.loads(content)
            if isinstance(values, dict) and has_no_checksum(values):
                return values
        return kind.read(content, path)
    except OSError as error:
        raise DamagedData(f"{path} cannot be read ({error.strerror or error}); {remedy(path)}") from None
    except SealError as error:
        raise DamagedData(f"{error}; {remedy(path)}") from None


def remedy(path: Path, elsewhere: str = "") -> str:
    """Says, as the second half of a sentence, how to make a damaged file of a data run again.

    `elsewhere` is what is said of a file that is in no stage's folder.
    """
    for folder in Path(os.path.normpath(path)).parents:
        if (folder / STAGE_MANIFEST).is_file():
            if "." in folder.name:  # an earlier result, kept because a training run uses it: see `mixture.earlier`
                return (
                    f"restore the folder {folder} from a copy, or run `trivium data run` with the settings that made it"
                )
            return f"delete the folder {folder} and run `trivium data run` again, which makes a new one"
    return elsewhere or (
        "delete the folder of the stage or plan that it belongs to, and run the command that made it again, usually "
        "`trivium data run`"
    )


def fault(expected: Expected, advance: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> str:
    """Compares a file with what is expected of it; returns the fault as the end of a sentence.

    Returns "" if nothing is wrong, or if `stop` was set before the whole file was read.
    """
    try:
        size = expected.path.stat().st_size
        if expected.size is not None and size != expected.size:
            return f"has {size:,} bytes and was written with {expected.size:,}"
        if expected.sha256 is None:
            return ""
        found = file_sha256(expected.path, advance, stop)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return "does not match its checksum" if found and found != expected.sha256 else ""


def check_files(files: Iterable[Expected], stop: threading.Event) -> list[str]:
    """Returns one sentence for each damaged file, with what to do about it; ends early once `stop` is set."""
    found = []
    for one in files:
        if stop.is_set():
            break
        if wrong := fault(one, stop=stop):
            found.append(
                f"{one.title} ({one.path}) {wrong}: it is damaged or belongs to another run; {remedy(one.path)}"
            )
    return found


def check_at_once(files: Sequence[Expected]) -> str:
    """Compares training data with its checksums, or with its sizes alone if there are more than FIRST_BYTES of it.

    Returns a sentence on what was not compared, "" if nothing was left out. Raises DamagedData for damaged files.
    """
    size = sum(file.size or 0 for file in files)
    looked_at = files if size <= FIRST_BYTES else [replace(file, sha256=None) for file in files]
    if found := check_files(looked_at, threading.Event()):
        more = f"; and {len(found) - _NAMED} more files" if len(found) > _NAMED else ""
        raise DamagedData("; ".join(found[:_NAMED]) + more)
    if size <= FIRST_BYTES:
        return ""
    return (
        f"the {size / 1e9:.1f} GB of training data have the right sizes, and were not compared with their checksums: "
        "the run does that while it trains, and `trivium data verify` at any time"
    )
