"""Copy of Trivium's own code that a submitted job runs, so that later edits of a checkout do not reach it.

A copy is named after its content and never changed, so jobs of the same code share one. Other packages, which the
Python environment holds, are not copied.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from configs.loader import ConfigError
from launch.bootstrap import OURS as PROGRAMS

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("cli.py", "pages.py")


def snapshot(folder: Path, copy: bool = True) -> Path:
    """Returns the absolute path of a copy of the code below `folder`, which is made unless it exists.

    Without `copy` it only says where that would be. Raises ConfigError if the copy cannot be written.
    """
    digest = hashlib.sha256()
    files = sorted(_files())
    for file in files:
        content = (ROOT / file).read_bytes()
        digest.update(f"{file.as_posix()}\0{len(content)}\0".encode() + content)
    there = folder.absolute() / digest.hexdigest()[:16]
    if not copy or there.is_dir():
        return there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished.", dir=folder))
        for file in files:
            (unfinished / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, unfinished / file)
        unfinished.chmod(0o755)
        try:
            os.rename(unfinished, there)
        except OSError:  # another launch has made the same copy meanwhile
            shutil.rmtree(unfinished)
            if not there.is_dir():
                raise
    except OSError as error:
        raise ConfigError(
            f"the code cannot be copied to {there}: {error.strerror}; make room, or name another folder"
        ) from None
    return there


def _files() -> Iterator[Path]:
    """Yields the files of the code, relative to its root."""
    yield from (Path(name) for name in MODULES if (ROOT / name).is_file())
    for package in ("configs", *PROGRAMS):
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith("."):
                yield file.relative_to(ROOT)
