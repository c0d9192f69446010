"""Runs stages: each is done once, published whole, and skipped while nothing that it depends on changes.

A stage writes to a temporary folder and is published by renaming that folder. Its manifest, `stage.json`, holds the
checksums of its files and its key: a hash of its settings, its code, its input files and the keys of the stages that it
reads. If a run is killed at any moment, a stage is either whole or absent.
"""

import ast
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from configs.files import file_sha256, sync, write_atomic
from configs.run_lock import locked
from configs.sealed import STAGE
from data_pipeline.core.hashing import digest
from data_pipeline.core.integrity import STAGE_MANIFEST, DamagedData, Expected, is_seal, read_sealed, remedy, unseal
from data_pipeline.core.ledger import Tally

_HERE, _PACKAGE = Path(__file__).parents[1], "data_pipeline"
LEDGER = "ledger.json"
_SETTLED_NS = 2 * 10**9  # at least the resolution of file times on any file system
# Modules that run, count or display the work; a change of them cannot change its result.
_NEUTRAL = ("executors", "core.full_disk", "core.ledger", "core.progress")

# Called with the folder of a stage's earlier result and that of the new one: moves the earlier one aside if it is still
# needed, and returns its new path.
KeepEarlier = Callable[[Path, Path], Path | None]


@dataclass(frozen=True)
class Stage:
    """Description of a stage of a data run: its work and everything that its result depends on.

    `work(folder, logs)` writes the results to `folder` and returns the counts of documents. By these counts, the
    documents that came in must be those that the stage `counted_against` passed on.
    """

    name: str
    work: Callable[[Path, Path], Tally]
    settings: Any  # the parts of the config that it reads, as JSON
    code: Sequence[str]  # modules of data_pipeline that do the work; the modules that they import count as well
    needs: Sequence["Stage"] = ()
    counted_against: "Stage | None" = None
    inputs: str = ""  # hash of input files
    packages: Sequence[str] = ()  # installed packages whose versions can change the result
    keep: KeepEarlier | None = None  # without it, the new result replaces the earlier one

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Hashes of the stage's config, code and inputs, and the key that is made of them, by name."""
        parts = {
            "config": digest(self.settings),
            "code": code_version(self.code, self.packages),
            "inputs": digest([self.inputs, [stage.identity["key"] for stage in self.needs]]),
        }
        return {**parts, "key": digest([self.name, parts])}


@dataclass(frozen=True)
class PublishedStage:
    """A stage whose result is in its final folder."""

    name: str
    folder: Path
    tally: Tally
    seconds: float
    fresh: bool  # made by this run, not found as an earlier one left it
    kept: Path | None = None  # the folder that an earlier, replaced result was moved to


def code_version(modules: Sequence[str], packages: Sequence[str]) -> str:
    """Hash of the source code of the modules, of all data_pipeline modules that they import, and of package versions.

    Raises ValueError if a module does not exist.
    """
    for module in modules:
        if source_file(f"{_PACKAGE}.{module}") is None:
            raise ValueError(f"a stage names {module!r} as its code, and {_PACKAGE} has no such module")
    files: set[Path] = set()
    waiting = [source_file(f"{_PACKAGE}.{module}") for module in modules]
    while waiting:
        file = waiting.pop()
        if file is not None and file not in files:
            files.add(file)
            waiting += _source(file)[1]
    sources = [[file.relative_to(_HERE).as_posix(), _source(file)[0]] for file in files]
    return digest([sorted(sources), [_version(package) for package in packages]])


_version = functools.cache(importlib.metadata.version)


def source_file(name: str) -> Path | None:
    """Path of a data_pipeline module whose code can change a stage's output, else None."""
    package, *parts = name.split(".")
    if package != _PACKAGE or not parts or any(f"{package}.{part}." in f"{name}." for part in _NEUTRAL):
        return None
    path = _HERE.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@functools.cache
def _source(file: Path) -> tuple[str, list[Path]]:
    """Returns the SHA-256 of a source file, and the data_pipeline files that it imports."""
    content = file.read_bytes()
    names = []
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:  # in `from a import b`, b may be a module
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    found = [source_file(name) for name in names]
    return hashlib.sha256(content).hexdigest(), [path for path in found if path is not None]


def file_hashes(paths: Sequence[Path], cache: Path) -> str:
    """SHA-256, in hex, of the names and contents of files; a file that cannot be read counts as "unreadable".

    `cache` is a JSON file that keeps each file's SHA-256 with its size, inode and times; a file is read again only if
    one of these changed. The inode change time (ctime) is among them, since a program that replaces a file cannot set
    that back. A file changed less than 2 seconds ago is not cached: a second change could leave it the same times.
    """
    known = {}
    with contextlib.suppress(OSError, ValueError):  # the cache is missing or damaged: read all files
        known = json.loads(cache.read_text())
    hashes = {}
    for path in paths:
        try:
            stat = path.stat()
            settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS
            version = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns] if settled else []
            entry = known.get(str(path))
            if not version or entry is None or entry["mark"] != version:
                entry = {"mark": version, "sha256": file_sha256(path)}
        except OSError:
            entry = {"mark": [], "sha256": "unreadable"}
        hashes[str(path)] = entry
    write_atomic(cache, json.dumps(hashes, indent=1).encode())
    return digest([[name, entry["sha256"]] for name, entry in hashes.items()])


def published(stage: Stage, run_dir: Path) -> PublishedStage | None:
    """Returns the stage as an earlier run published it, if its key is unchanged and all files have their sizes.

    Returns None if the stage has to run. Raises DamagedData if its manifest was changed.
    """
    folder = run_dir / stage.name
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    if missing := {"key", "sources", "seconds"} - manifest.keys():
        path = folder / STAGE_MANIFEST
        raise DamagedData(f"{path} lacks {' and '.join(sorted(missing))}; {remedy(path)}")
    if manifest["key"] != stage.identity["key"]:
        return None
    for file in expected_files(folder, manifest):
        if not file.path.is_file() or file.path.stat().st_size != file.size:
            return None
    return PublishedStage(stage.name, folder, Tally.from_plain(manifest["sources"]), manifest["seconds"], fresh=False)


def made_by_other_code(stages: Sequence[Stage], run_dir: Path) -> list[str]:
    """Names of the stages that an earlier run published with other code or package versions than the present ones."""
    made = {stage.name: read_manifest(run_dir / stage.name) for stage in stages}
    return [
        stage.name
        for stage in stages
        if (manifest := made[stage.name]) and manifest.get("code") != stage.identity["code"]
    ]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Reads the manifest of a published stage, None for a folder without one. Raises DamagedData if it is damaged."""
    path = folder / STAGE_MANIFEST
    if not path.is_file():
        return None
    return read_sealed(STAGE, path, has_no_checksum=_is_from_before_checksums)


def has_finished(run_dir: Path, stage: str) -> bool:
    """Tells whether a stage is published, and by the last run in `run_dir`, whose ledger lists its finished stages.

    What else is there is of an earlier run: its rows may be of other documents, or its cuts be made no more. Raises
    DamagedData if the stage's manifest is damaged.
    """
    names = in_ledger(run_dir)
    return read_manifest(run_dir / stage) is not None and (names is None or stage in names)


def in_ledger(run_dir: Path) -> list[str] | None:
    """Returns the names of the stages in a data run's ledger; None if there is none or it is damaged."""
    try:
        return [stage["name"] for stage in json.loads((run_dir / LEDGER).read_text(encoding="utf-8"))["stages"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_from_before_checksums(manifest: dict[str, Any]) -> bool:
    """Tells whether a manifest was written by a version of Trivium that wrote no checksums."""
    return "format" not in manifest and all(isinstance(size, int) for size in manifest.get("files", {}).values())


def expected_files(folder: Path, manifest: dict[str, Any]) -> list[Expected]:
    """Lists a stage's files as its manifest records them; the SHA-256 is None in manifests of an earlier version."""
    stage, found = folder.name, []
    for name, entry in manifest["files"].items():
        size, sha256 = (entry["bytes"], entry["sha256"]) if isinstance(entry, dict) else (entry, None)
        found.append(Expected(folder / name, f"stage {stage}, {name}", size, sha256))
    return found


def perform(stage: Stage, run_dir: Path, before: Tally | None) -> PublishedStage:
    """Runs a stage and publishes it; `before` is the tally of the stage that it is counted against.

    Raises whatever the work raises, and LedgerError if the counts do not add up.
    """
    started = time.monotonic()
    # Each attempt has folders of its own: a task of a killed attempt, perhaps on another node, may still be writing.
    attempt = f"{stage.name}.{secrets.token_hex(4)}"
    folder, logs = run_dir / f".{attempt}.tmp", run_dir / "logs" / attempt
    for old in logs.parent.glob(f"{stage.name}.*"):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir()
    logs.mkdir(parents=True)
    tally = stage.work(folder, logs)
    tally.check(stage.name, before)
    seconds = time.monotonic() - started
    manifest = {
        "name": stage.name,
        **stage.identity,
        "seconds": round(seconds, 3),
        "total": tally.total().plain(),
        "sources": tally.plain(),
        "files": _sync_files(folder),
    }
    (folder / STAGE_MANIFEST).write_bytes(STAGE.write(manifest))
    sync(folder / STAGE_MANIFEST)
    final = run_dir / stage.name
    kept = stage.keep(final, folder) if stage.keep and final.is_dir() else None
    replace_folder(folder, final)
    return PublishedStage(stage.name, final, tally, seconds, fresh=True, kept=kept)


def replace_folder(folder: Path, target: Path) -> None:
    """Renames `folder` to `target` and deletes what was there before.

    If the process is killed in between, `target` is absent, never a mixture of both.
    """
    if target.exists():
        old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old.tmp")
        os.rename(target, old)
        shutil.rmtree(old)
    sync(folder)
    os.rename(folder, target)
    sync(target.parent)


def _sync_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Flushes all files of a folder to disk; returns their bytes and SHA-256, by name, and removes their seals."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not is_seal(path)):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": unseal(path)}
    for seal in [path for path in folder.rglob(".*") if is_seal(path)]:
        seal.unlink()  # its file was written by a task and deleted again
    return files


@contextlib.contextmanager
def sole_user(run_dir: Path) -> Iterator[None]:
    """Locks the run directory for this process, and deletes temporary folders that killed runs left in it.

    Raises ValueError if another process holds the lock.
    """
    with locked(run_dir, _take) as lock:
        if lock is None:
            raise ValueError(f"another data run is at work in {run_dir}; wait for it, or give this one its own run.dir")
        for leftover in run_dir.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _take(lock: IO[str]) -> bool:
    try:
        # A POSIX lock: datatrove's workers would inherit a flock and hold it after this process ends.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
