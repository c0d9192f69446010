"""Search for the files that a source's patterns name, on any file system that fsspec supports, and opening them.

A pattern is a path, a glob, or a folder, which is searched for files of the source's format. Brackets in the name of an
existing folder are taken literally. Files are listed by printable names (see `names`). Links in local folders are
followed, each folder once: a loop or a file reached twice is reported and not read again. Files of one source are
identified by device and inode; a file that is in two sources is read for both.

Endpoint and credentials of remote systems come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID...) or from
fsspec's own configuration (FSSPEC_S3_ENDPOINT_URL, ~/.config/fsspec); this module does not read, keep or show them.
Over HTTP each URL is one file, since servers do not list files, and the server has to state the file's size. If it
states no version (ETag, Last-Modified), a change that keeps the size is not noticed. Writing to remote systems is not
supported.
"""

import contextlib
import glob
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.utils import glob_translate

from configs.loader import ConfigError
from configs.sources import SourceConfig
from data_pipeline.reading.formats import not_read, skip_reason, wanted
from data_pipeline.reading.input_records import NOT_READ, FoundFile
from data_pipeline.reading.names import openable, printable

_REMOTE_BLOCK = 1 << 22  # bytes that one request to a remote system fetches and that are held in memory
# Names that file systems use for the version of an object, the best first: checksums before times.
_VERSIONS = (
    *("ETag", "etag", "md5Hash", "crc32c", "content_hash", "checksum", "Content-MD5", "Digest"),
    *("LastModified", "Last-Modified", "mtime", "created"),
)
_HTTP = ("http://", "https://")
_HTTP_GONE = (404, 410)


def find_files(name: str, source: SourceConfig, section: str = "") -> list[FoundFile]:
    """Returns the files of source `name`, sorted by path. Raises ConfigError if a pattern matches no file.

    `section` is the config section of the source, for messages; by default it is sources.NAME.
    """
    found: dict[str, FoundFile] = {}
    for pattern in source.files:
        key = f"{section or f'sources.{name}'}.files"
        files = list(_found(pattern, source, key))
        if not files:
            raise ConfigError(
                f"{key}: {pattern!r} matches no file, looked for from {Path.cwd()}; correct the path, or run from the "
                f"folder that it is relative to (a folder is searched for files of format {source.format!r})"
            )
        if all(file.reason == NOT_READ for file in files):
            others = f" and {len(files) - 1:,} more" if len(files) > 1 else ""
            raise ConfigError(
                f"{key}: {printable(files[0].path)}{others} cannot be read, since gzip and Zstandard are the only "
                "compressions that are, and no archives; unpack it, or compress each file with gzip or Zstandard"
            )
        for file in files:
            found.setdefault(file.path, file)
    files = _each_once([found[path] for path in sorted(found)])
    return [replace(file, path=printable(file.path), root=printable(file.root)) for file in files]


def _found(pattern: str, source: SourceConfig, key: str) -> Iterator[FoundFile]:
    if is_http(pattern):
        return _http(pattern, key)
    return _remote(pattern, source, key) if is_remote(pattern) else _local(pattern, source)


def is_remote(path: str) -> bool:
    """Whether a path is a URL of a remote file system."""
    return "://" in path


def is_http(path: str) -> bool:
    """Whether a path is an HTTP or HTTPS URL."""
    return path.lower().startswith(_HTTP)


def open_file(name: str) -> BinaryIO:
    """Opens a file, named as `FoundFile.path` is, for reading; a remote file is fetched block by block.

    Raises OSError if it cannot be opened, ValueError if its HTTP server sends only whole files.
    """
    path = openable(name)
    if not is_remote(path):
        return open(path, "rb")
    system, inner = fsspec.core.url_to_fs(path)
    file = system.open(inner, "rb", block_size=_REMOTE_BLOCK, cache_type="readahead")
    if is_http(path) and file.size > _REMOTE_BLOCK:
        try:
            file.seek(file.size - 1)
            file.read(1)
            file.seek(0)
        except ValueError:
            raise ValueError(
                f"{name}: its server does not support HTTP range requests, by which files above "
                f"{_REMOTE_BLOCK >> 20} MiB are read; copy the file to this machine and name the copy"
            ) from None
    return file


def _local(pattern: str, source: SourceConfig) -> Iterator[FoundFile]:
    """Yields the local files that a pattern matches."""
    folder = _literal_folder(pattern)
    rest = pattern.removeprefix(folder)
    if not glob.has_magic(rest) or os.path.lexists(pattern):
        yield from _search(pattern, source) if os.path.isdir(pattern) else _named([pattern])
    elif "**" not in rest:
        for match in sorted(glob.glob(glob.escape(folder) + rest)):
            yield from _search(match, source) if os.path.isdir(match) else _named([match])
    else:  # glob's own ** would follow a loop of links until the system gives up
        root = folder.rstrip("/") or "/" if folder else "."
        matches = re.compile(glob_translate(rest)).match
        for path, reason in _walk(root, source):
            name = path if folder else path.removeprefix("./")
            if reason or matches(name.removeprefix(folder)):
                yield _look(name, root, reason)


def _literal_folder(pattern: str) -> str:
    """Returns the longest beginning of a pattern that is, taken literally, an existing folder, with its slash."""
    position = len(pattern)
    while (position := pattern.rfind("/", 0, position)) >= 0:
        if os.path.isdir(pattern[: position + 1]):
            return pattern[: position + 1]
    return ""


def _named(paths: list[str]) -> Iterator[FoundFile]:
    yield from (_look(path, os.path.dirname(path)) for path in paths if os.path.lexists(path))


def _search(folder: str, source: SourceConfig) -> Iterator[FoundFile]:
    root = folder.rstrip("/") or "/"
    for path, reason in _walk(root, source):
        if reason or wanted(path, source):
            yield _look(path, root, reason)


def _walk(root: str, source: SourceConfig) -> Iterator[tuple[str, str]]:
    """Yields (path, "") for every file under `root` and (path, reason) for every folder that is not searched.

    Links to folders are followed last, so that files reachable without a link are listed under their own path.
    """
    seen: set[tuple[int, int]] = set()
    waiting, links = [root], list[str]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        try:
            mark = os.stat(folder)
            if (mark.st_dev, mark.st_ino) in seen:
                yield folder, "symlink_loop" if _leads_up(folder) else "seen_before"
                continue
            seen.add((mark.st_dev, mark.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            yield folder, "unreadable"
            continue
        for entry in entries:
            if not os.path.isdir(entry.path):  # unlike entry.is_dir(), False for a link to itself
                yield entry.path, ""
            elif reason := skip_reason(entry.name, source):
                if reason != "version_control":
                    yield entry.path, reason
            else:
                (links if entry.is_symlink() else waiting).append(entry.path)


def _leads_up(link: str) -> bool:
    """Whether a link points to the folder it is in or to one above it, which makes a loop."""
    target, folder = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    return folder == target or folder.startswith(target.rstrip("/") + "/")


def _look(path: str, root: str, reason: str = "") -> FoundFile:
    """Returns the local file at `path` with its size, or with the reason why it cannot be read."""
    if reason:
        return FoundFile(path, 0, root, reason)
    try:
        status = os.stat(path)
    except OSError as error:
        return FoundFile(path, 0, root, "symlink_loop" if "symbolic links" in str(error) else "unreadable")
    if not stat.S_ISREG(status.st_mode):
        return FoundFile(path, status.st_size, root, "not_a_file")
    return FoundFile(path, status.st_size, root, NOT_READ if not_read(path) else "")


def _each_once(files: list[FoundFile]) -> list[FoundFile]:
    """Marks each local file that is listed under several paths as `seen_before`, except under one of them.

    Paths without a link are preferred, then the first in alphabetical order.
    """
    names: dict[tuple[int, int], list[str]] = {}
    for file in files:
        if not file.reason and not is_remote(file.path):
            with contextlib.suppress(OSError):  # if the file was removed since, its reader reports that
                status = os.stat(file.path)
                names.setdefault((status.st_dev, status.st_ino), []).append(file.path)
    again: set[str] = set()
    for paths in names.values():
        if len(paths) > 1:
            again.update(sorted(paths, key=lambda path: (os.path.realpath(path) != os.path.abspath(path), path))[1:])
    return [FoundFile(file.path, 0, file.root, "seen_before") if file.path in again else file for file in files]


def _remote(pattern: str, source: SourceConfig, key: str) -> Iterator[FoundFile]:
    """Yields the files that a pattern matches on a remote system; raises ConfigError if it cannot be listed."""
    try:
        system, inner = fsspec.core.url_to_fs(pattern)
        system.invalidate_cache()
        magic = glob.has_magic(inner)
        listing = system.glob(inner, detail=True) if magic else system.find(inner, detail=True)
        searched = not magic and inner.rstrip("/") not in listing
    except ImportError as error:
        raise ConfigError(f"{key}: {pattern!r}: {error}; install that package, or copy the files") from None
    except Exception as error:  # clients raise errors of their own, whose text may contain credentials
        detail = "".join(f": {line}" for line in str(error).splitlines()[:1] if isinstance(error, OSError))
        raise ConfigError(
            f"{key}: {pattern!r} cannot be listed ({type(error).__name__}{detail}); check the address, and endpoint "
            "and credentials in the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID...) or in fsspec's configuration"
        ) from None
    root = system.unstrip_protocol(inner if searched else re.split(r"[*?\[]", inner)[0].rsplit("/", 1)[0])
    skipped: dict[str, str] = {}
    for name, info in sorted(listing.items()):
        path = system.unstrip_protocol(name)
        if info["type"] != "file" or name.endswith("/") or (searched and not wanted(path, source)):
            continue
        if not _in_skipped(path, root, source, skipped):
            reason = NOT_READ if not_read(path) else ""
            yield FoundFile(path, info["size"] or 0, root, reason, identity=_identity(info))
    yield from (FoundFile(folder, 0, root, reason) for folder, reason in sorted(skipped.items()))


def _http(address: str, key: str) -> Iterator[FoundFile]:
    """Yields the file at an HTTP URL, or nothing if it does not exist; raises ConfigError for any other failure."""
    if "*" in address or address.endswith("/"):
        raise ConfigError(f"{key}: {address!r}: HTTP servers do not list files; give the address of each file")
    system, inner = fsspec.core.url_to_fs(address)
    try:
        info = system.info(inner)
    except FileNotFoundError as error:  # fsspec raises this for every failure; the real one is its cause
        cause: Any = error.__cause__
        if getattr(cause, "status", None) in _HTTP_GONE:
            return
        status = f" {cause.status}" if hasattr(cause, "status") else ""
        raise ConfigError(
            f"{key}: {address!r} cannot be read ({type(cause).__name__}{status}); check the address and the network, "
            "or copy the file here"
        ) from None
    if info["size"] is None or info.get("partial") is False:
        raise ConfigError(
            f"{key}: {address!r}: its server does not state the file's size, or does not support HTTP range requests, "
            "both of which are needed to read it; copy the file to this machine and name the copy"
        )
    yield FoundFile(address, info["size"], identity=_identity(info))


def _in_skipped(path: str, root: str, source: SourceConfig, skipped: dict[str, str]) -> bool:
    """Whether `path` lies in a folder below `root` that is not searched; notes the folder and reason in `skipped`."""
    folder = root
    for part in path.removeprefix(root).strip("/").split("/")[:-1]:
        folder = f"{folder}/{part}"
        if reason := skip_reason(part, source):
            if reason != "version_control":
                skipped[folder] = reason
            return True
    return False


def _identity(info: dict[str, Any]) -> str:
    """Returns "NAME=VALUE" of the best version that a remote object's listing gives, or "" if it gives none."""
    return next((f"{name}={info[name]}" for name in _VERSIONS if info.get(name) is not None), "")
