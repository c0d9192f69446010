"""A mirror: copies of a run's checkpoints in another folder, or behind any address that fsspec knows, such as S3.

It is laid out as a run's folder, so that a mirror in a folder can be used as one: `checkpoints/step_N/`, and the small
files in RUN_FILES. The manifest of a checkpoint is written last and removed first: a checkpoint without a manifest that
matches its own checksum is not whole. Files are streamed, and compared with size and SHA-256 of the manifest on their
way. Credentials and endpoint come from the environment or fsspec's own configuration; they are neither read nor shown
here.
"""

import contextlib
import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from configs.files import write_atomic
from configs.loader import ConfigError
from configs.sealed import CHECKPOINT
from pretrain.checkpoint import storage
from pretrain.checkpoint.storage import MANIFEST, CheckpointError

# Files of a run, beside its checkpoints, that a mirror has, too: what a run that goes on elsewhere would miss.
RUN_FILES = (
    *("config.toml", "env.json", "history.json", "metrics.jsonl", "rewinds.json", "samples.jsonl", "time.json"),
    *("chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
)
ID = "mirror_id"  # file in a run's folder and in its mirror: both belong together if its content is the same
TRIES, FIRST_PAUSE = 5, 1.0  # how often one file is tried, and the seconds before the second time, doubled each time
_BLOCK = 8 << 20  # bytes
# File systems without folders, where making one would make a bucket.
_NO_FOLDERS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "r2"}
T = TypeVar("T")


class MirrorError(Exception):
    """Error for a mirror that cannot be read or written; its text has no credentials."""


def patiently(action: Callable[[], T], stop: threading.Event) -> T:
    """Returns what `action` returns, which is tried TRIES times with growing pauses, unless `stop` is set meanwhile."""
    pause = FIRST_PAUSE
    for last in [False] * (TRIES - 1) + [True]:
        try:
            return action()
        except MirrorError:
            if last or stop.wait(pause):
                raise
            pause *= 2
    raise AssertionError


class Mirror:
    """The files of a mirror at `address`. Every method raises MirrorError if the file system fails."""

    def __init__(self, address: str):
        """Raises ConfigError if no file system is known for the address."""
        self.address = address
        try:
            self._system, self._root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"checkpoint.mirror = {address!r}: {error}; install the package that it needs, or name another address"
            ) from None
        protocol = self._system.protocol
        self._has_folders = not _NO_FOLDERS & {protocol, *(protocol if isinstance(protocol, tuple) else ())}

    @property
    def is_local(self) -> bool:
        """Whether the mirror is a folder of this machine's file systems."""
        return isinstance(self._system, fsspec.implementations.local.LocalFileSystem)

    def named(self, step: int) -> str:
        """Address of the checkpoint of `step`."""
        return f"{self.address}/checkpoints/step_{step}"

    def steps(self) -> list[int]:
        """Lists the steps of all checkpoints, whole or not, ascending."""
        with _translated():
            self._system.invalidate_cache()
            try:
                entries = self._system.ls(f"{self._root}/checkpoints", detail=False)
            except FileNotFoundError:
                return []
        names = [str(entry).rstrip("/").rpartition("/")[2] for entry in entries]
        return sorted(int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdecimal())

    def read(self, name: str) -> bytes | None:
        """Reads a small file; None if there is none."""
        with _translated():
            self._system.invalidate_cache()
            try:
                return bytes(self._system.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        with _translated():
            self._make_folder(name)
            self._system.pipe_file(f"{self._root}/{name}", content)

    def manifest(self, step: int) -> bytes | None:
        """Reads the manifest of a checkpoint; None if it has none, as one that is still being copied."""
        return self.read(f"checkpoints/step_{step}/{MANIFEST}")

    def remove(self, step: int) -> None:
        """Removes a checkpoint, its manifest first."""
        folder = f"{self._root}/checkpoints/step_{step}"
        with _translated():
            for path in (f"{folder}/{MANIFEST}", folder):
                with contextlib.suppress(FileNotFoundError):
                    self._system.rm(path, recursive=path == folder)

    def put(self, file: Path, name: str, facts: dict[str, Any]) -> None:
        """Copies a local file to the mirror. Raises CheckpointError if it does not match its size and SHA-256."""
        target, digest, size = f"{self._root}/{name}", hashlib.sha256(), 0
        with _translated(), open(file, "rb") as source:
            self._make_folder(name)
            sink = self._system.open(target, "wb")
            try:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    size += len(block)
                    sink.write(block)
            except BaseException:
                with contextlib.suppress(Exception):
                    sink.discard()
                raise
            sink.close()
            if digest.hexdigest() != facts["sha256"]:
                raise CheckpointError(f"{file} does not match its SHA-256: it is damaged")
            self._system.invalidate_cache()
            arrived = self._system.info(target)["size"]
        if arrived != size:
            raise MirrorError(f"{self.address}/{name} has {arrived} bytes after {size} were written")

    def fetch(self, name: str, file: Path, facts: dict[str, Any]) -> None:
        """Copies a file of the mirror to `file`. Raises CheckpointError if it does not match its size and SHA-256."""
        digest = hashlib.sha256()
        with _translated():
            try:
                with self._system.open(f"{self._root}/{name}", "rb", block_size=_BLOCK) as source:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with open(file, "wb") as sink:
                        while block := source.read(_BLOCK):
                            digest.update(block)
                            sink.write(block)
                        sink.flush()
                        os.fsync(sink.fileno())
                        size = sink.tell()
            except FileNotFoundError:
                raise CheckpointError(f"{self.address}/{name} is missing") from None
        if (size, digest.hexdigest()) != (facts["bytes"], facts["sha256"]):
            raise CheckpointError(f"{self.address}/{name} does not match its size and SHA-256: it is damaged")

    def _make_folder(self, name: str) -> None:
        if self._has_folders:
            self._system.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Context that raises the errors of a file system as MirrorError.

    Clients raise errors of their own, and only the texts of those of the system are known to have no credentials.
    """
    try:
        yield
    except (CheckpointError, MirrorError):
        raise
    except Exception as error:
        said = "".join(f": {line}" for line in str(error).splitlines()[:1] if isinstance(error, OSError))
        raise MirrorError(f"{type(error).__name__}{said}") from None


def files_of(manifest: bytes, where: str, read: Callable[[str], bytes | None]) -> dict[str, dict[str, Any]]:
    """Returns size and SHA-256 of each file of a checkpoint but its manifest; `read` returns a file of it by name.

    Raises CheckpointError if the manifest, or that of a model beside the first, is damaged.
    """
    tree = _manifest(manifest, where)
    found = dict(tree["files"])
    for folder, sha256 in tree.get("companions", {}).items():
        name = f"{folder}/{MANIFEST}"
        content = read(name)
        if content is None or hashlib.sha256(content).hexdigest() != sha256:
            raise CheckpointError(f"{where}/{name} is missing or damaged")
        found[name] = {"bytes": len(content), "sha256": sha256}
        found |= {f"{folder}/{file}": facts for file, facts in _manifest(content, where)["files"].items()}
    return found


def _manifest(content: bytes, where: str) -> dict[str, Any]:
    try:
        return CHECKPOINT.read(content, Path(MANIFEST))
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from None


def newest(mirror: Mirror, after: int) -> Iterator[tuple[int, bytes]]:
    """Yields step and manifest of the checkpoints of steps after `after` that have a manifest, the newest first."""
    for step in reversed(mirror.steps()):
        if step > after and (manifest := mirror.manifest(step)) is not None:
            yield step, manifest


def newest_manifest(address: str) -> dict[str, Any]:
    """Returns the manifest of the newest checkpoint in a mirror; empty if there is none, or it cannot be read."""
    with contextlib.suppress(MirrorError):
        mirror = Mirror(address)
        for step, content in newest(mirror, -1):
            with contextlib.suppress(CheckpointError):
                return _manifest(content, mirror.named(step))
    return {}


def _ids(mirror: Mirror, run_dir: Path) -> tuple[str, str]:
    """Returns what the run and the mirror have noted of each other, "" where nothing is."""
    file = run_dir / ID
    own = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    return own, (mirror.read(ID) or b"").decode(errors="replace").strip()


def check_owner(mirror: Mirror, run_dir: Path) -> None:
    """Raises ConfigError if the mirror is that of another run than the one in `run_dir`, which has checkpoints."""
    own, theirs = _ids(mirror, run_dir)
    if theirs and own != theirs:
        raise ConfigError(
            f"checkpoint.mirror = {mirror.address!r} holds the checkpoints of another run than {run_dir}; name another "
            "folder there"
        )


def claim(mirror: Mirror, run_dir: Path) -> None:
    """Notes in run and mirror that they belong together, also where the mirror outlived the folder of its run."""
    own, theirs = _ids(mirror, run_dir)
    shared = theirs or own or uuid.uuid4().hex
    if not theirs:
        mirror.write(ID, shared.encode())
    if own != shared:
        write_atomic(run_dir / ID, shared.encode())


def local_files(path: Path) -> dict[str, dict[str, Any]]:
    """Returns size and SHA-256 of each file of a local checkpoint but its manifest. Raises CheckpointError."""

    def read(name: str) -> bytes | None:
        file = path / name
        return file.read_bytes() if file.is_file() else None

    return files_of((path / MANIFEST).read_bytes(), str(path), read)


def is_same(mirror: Mirror, run_dir: Path, step: int) -> bool:
    """Whether the mirror has a whole copy of the run's checkpoint of `step`, equal to the run's own."""
    return mirror.manifest(step) == (storage.directory(run_dir, step) / MANIFEST).read_bytes()
