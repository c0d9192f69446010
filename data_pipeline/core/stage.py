"""Stages: work done once, published whole, skipped when nothing that it depends on has changed.

A stage writes into a temporary folder beside its own and is published by rename, with a `stage.json` that
holds its key: a hash of its settings, its code, its input files and the keys of the stages before it, and the
checksums of its files. Killed anywhere, a stage is either whole or absent. What the stages do lives in `stages`.
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
from data_pipeline.core.integrity import STAGE_MANIFEST, Expected, is_seal, read_sealed, unseal
from data_pipeline.core.ledger import Tally

_HERE, _PACKAGE = Path(__file__).parents[1], "data_pipeline"
_SETTLED_NS = 2 * 10**9  # no file system's clock is coarser
# Who does the work, and who counts it, change nothing in the result.
_NEUTRAL = ("executors", "core.full_disk", "core.ledger", "core.progress")


@dataclass(frozen=True)
class Stage:
    """`work(folder, logs)` fills `folder` and returns the counts of documents; `before` is counted against
    it.
    """

    name: str
    work: Callable[[Path, Path], Tally]
    settings: Any  # what of the config it reads, as JSON
    code: Sequence[str]  # modules of data_pipeline that do the work; what they import counts too
    needs: Sequence["Stage"] = ()
    counted_against: "Stage | None" = None
    inputs: str = ""  # hash of input files
    packages: Sequence[str] = ()  # whose versions change the result
    # Given an earlier result's folder and the new one's: moves what is still needed of it aside, and says where to.
    keep: Callable[[Path, Path], Path | None] | None = None

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """The parts of the key, by name, and the key itself."""
        parts = {
            "config": digest(self.settings),
            "code": code_version(self.code, self.packages),
            "inputs": digest([self.inputs, [stage.identity["key"] for stage in self.needs]]),
        }
        return {**parts, "key": digest([self.name, parts])}


@dataclass(frozen=True)
class PublishedStage:
    """A published stage."""

    name: str
    folder: Path
    tally: Tally
    seconds: float
    fresh: bool  # made by this run, not found
    kept: Path | None = None  # where an earlier result that it replaced still is


def code_version(modules: Sequence[str], packages: Sequence[str]) -> str:
    """Hash of the source of the modules and of all in data_pipeline that they import, and of the packages' versions.

    Errors: ValueError for a module that does not exist.
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
    """Of a module whose code decides what a stage publishes; None for a name that is none, or another package's."""
    package, *parts = name.split(".")
    if package != _PACKAGE or not parts or any(f"{package}.{part}." in f"{name}." for part in _NEUTRAL):
        return None
    path = _HERE.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@functools.cache
def _source(file: Path) -> tuple[str, list[Path]]:
    """The sha256 of a source file, and the files of this package that it imports."""
    content = file.read_bytes()
    names = []
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:  # of `from a import b` b may be a module
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    found = [source_file(name) for name in names]
    return hashlib.sha256(content).hexdigest(), [path for path in found if path is not None]


def file_hashes(paths: Sequence[Path], cache: Path) -> str:
    """One SHA-256 over the contents of `paths`; one that cannot be read counts as that.

    A file is not read again if it is as `cache` has it: by size, inode and times. Among them is the time of its last
    change of any kind, which nobody who replaces a file can set back; right after a change it may not have moved on.
    """
    known = {}
    with contextlib.suppress(OSError, ValueError):  # a cache that is not there or damaged is made anew
        known = json.loads(cache.read_text())
    hashes = {}
    for path in paths:
        try:
            stat = path.stat()
            settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS
            mark = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns] if settled else []
            entry = known.get(str(path))
            if not mark or entry is None or entry["mark"] != mark:
                entry = {"mark": mark, "sha256": file_sha256(path)}
        except OSError:
            entry = {"mark": [], "sha256": "unreadable"}
        hashes[str(path)] = entry
    write_atomic(cache, json.dumps(hashes, indent=1).encode())
    return digest([[name, entry["sha256"]] for name, entry in hashes.items()])


def published(stage: Stage, run_dir: Path) -> PublishedStage | None:
    """The stage as an earlier run left it, if its key and every file's size still hold.

    Errors: DamagedData for a manifest that is not as it was written.
    """
    folder = run_dir / stage.name
    manifest = read_manifest(folder)
    if manifest is None or manifest["key"] != stage.identity["key"]:
        return None
    for file in expected_files(folder, manifest):
        if not file.path.is_file() or file.path.stat().st_size != file.size:
            return None
    return PublishedStage(stage.name, folder, Tally.from_plain(manifest["sources"]), manifest["seconds"], fresh=False)


def made_by_other_code(stages: Sequence[Stage], run_dir: Path) -> list[str]:
    """Names of stages that an earlier run published and that run again because what makes them was changed."""
    made = {stage.name: read_manifest(run_dir / stage.name) for stage in stages}
    return [
        stage.name
        for stage in stages
        if (manifest := made[stage.name]) and manifest.get("code") != stage.identity["code"]
    ]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Reads the manifest of a published stage, None for a folder without one. Raises DamagedData if it is damaged."""
    path = folder / STAGE_MANIFEST
    return read_sealed(STAGE, path, unsealed=_of_old) if path.is_file() else None


def _of_old(manifest: dict[str, Any]) -> bool:
    """Whether a manifest was written by a version that wrote no checksums."""
    return "format" not in manifest and all(isinstance(size, int) for size in manifest.get("files", {}).values())


def expected_files(folder: Path, manifest: dict[str, Any]) -> list[Expected]:
    """The files of a stage as its manifest has them; of an earlier version without checksums."""
    stage, found = folder.name, []
    for name, entry in manifest["files"].items():
        size, sha256 = (entry["bytes"], entry["sha256"]) if isinstance(entry, dict) else (entry, None)
        found.append(Expected(folder / name, f"stage {stage}, {name}", size, sha256))
    return found


def perform(stage: Stage, run_dir: Path, before: Tally | None) -> PublishedStage:
    """Runs a stage and publishes it.

    Errors: whatever the work raises; LedgerError when its counts do not add up.
    """
    started = time.monotonic()
    # Both folders are this attempt's alone: a task of a killed one, on another node perhaps, may still write to its
    # own.
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
        "files": _settle(folder),
    }
    (folder / STAGE_MANIFEST).write_bytes(STAGE.write(manifest))
    sync(folder / STAGE_MANIFEST)
    final = run_dir / stage.name
    kept = stage.keep(final, folder) if stage.keep and final.is_dir() else None
    replace_folder(folder, final)
    return PublishedStage(stage.name, final, tally, seconds, fresh=True, kept=kept)


def replace_folder(folder: Path, target: Path) -> None:
    """Renames `folder` to `target`, whatever was there.

    Killed in between, `target` is absent, never mixed.
    """
    if target.exists():
        old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old.tmp")
        os.rename(target, old)
        shutil.rmtree(old)
    sync(folder)
    os.rename(folder, target)
    sync(target.parent)


def _settle(folder: Path) -> dict[str, dict[str, Any]]:
    """Brings all files of a folder to disk; their sizes and checksums by name."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not is_seal(path)):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": unseal(path)}
    for seal in [path for path in folder.rglob(".*") if is_seal(path)]:
        seal.unlink()  # of a file that a task wrote and took away again
    return files


@contextlib.contextmanager
def sole_user(run_dir: Path) -> Iterator[None]:
    """Holds the run directory for this process, and clears what killed runs left half done in it."""
    with locked(run_dir, _take) as lock:
        if lock is None:
            raise ValueError(f"another data run is at work in {run_dir}; wait for it, or give this one its own run.dir")
        for leftover in run_dir.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _take(lock: IO[str]) -> bool:
    try:
        # A POSIX lock, since a flock would be inherited by datatrove's workers and outlive this process in them.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
