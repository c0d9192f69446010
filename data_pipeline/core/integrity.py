"""Checksums: of the files that a data run publishes, and of the values in its manifests.

Whoever writes a big file seals it (`seal`): its SHA-256 goes into a hidden file beside it, which the stage takes up
into its manifest, so that the leading process need not read the file again. A manifest holds the checksum of its own
values, so that a changed digit is noticed. Comparing files with their checksums is done by `check_files`.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.sealed import Format, SealError

STAGE_MANIFEST = "stage.json"
_CHUNK = 1 << 20


class DamagedData(ValueError):
    """A published file is not what it was when it was written. One sentence: which one, and what to do."""


@dataclass(frozen=True)
class Expected:
    """A file as it was written, as far as is known. `title` is what a message calls it."""

    path: Path
    title: str
    size: int | None
    sha256: str | None


def file_sha256(path: Path, advance: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> str:
    """Of the whole content; `advance` is called with the bytes read since its last call. "" if stopped."""
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
    """Puts the checksum of a finished file beside it, for `unseal`; `sha256` where the writer knows it already."""
    _seal_of(path).write_text(sha256 or file_sha256(path), encoding="ascii")


def unseal(path: Path) -> str:
    """The checksum of a file, from its seal, which goes, or from its content."""
    seal_file = _seal_of(path)
    if not seal_file.is_file():
        return file_sha256(path)
    found = seal_file.read_text(encoding="ascii")
    seal_file.unlink()
    return found


def is_seal(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".sha256")


def _seal_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def read_sealed(
    kind: Format, path: Path, unsealed: Callable[[dict[str, Any]], bool] = lambda _: False
) -> dict[str, Any]:
    """The values of a manifest that has a checksum of them; `unsealed` tells which of earlier versions have none.

    Errors: DamagedData for one that cannot be read or whose values are not those that were written.
    """
    try:
        content = path.read_bytes()
        with contextlib.suppress(ValueError):
            values = json.loads(content)
            if isinstance(values, dict) and unsealed(values):
                return values
        return kind.read(content, path)
    except OSError as error:
        raise DamagedData(f"{path} cannot be read ({error.strerror or error}); {remedy(path)}") from None
    except SealError as error:
        raise DamagedData(f"{error}; {remedy(path)}") from None


def remedy(path: Path) -> str:
    """How a damaged file of a data run is made anew: as a part of a sentence, with the folder to delete."""
    for folder in path.parents:
        if (folder / STAGE_MANIFEST).is_file():
            if "." in folder.name:  # an earlier result, that was kept for a training run: see `mixture.earlier`
                return (
                    f"restore the folder {folder} from a copy, or run `trivium data run` with the settings that it was "
                    "made with"
                )
            return f"delete the folder {folder} and run `trivium data run` again, which makes it anew"
    return (
        "delete the folder of the stage or plan that it belongs to, and make it anew by the command that made it, "
        "`trivium data run` mostly"
    )


def fault(expected: Expected, advance: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> str:
    """What is wrong with a file, as the end of a sentence about it; "" for nothing, or when stopped."""
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
    """A sentence for each damaged file, with what to do; ends early when `stop` is set."""
    found = []
    for one in files:
        if stop.is_set():
            break
        if wrong := fault(one, stop=stop):
            found.append(f"{one.title} ({one.path}) {wrong}: it is damaged or of another run; {remedy(one.path)}")
    return found
