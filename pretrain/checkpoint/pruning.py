"""Removal of old checkpoints, and notes in those that other runs need, which stay.

A run may need another one's checkpoint as long as it trains or is read: as the reference of a divergence, as a reward
model, or as the base of its adapters where it cannot keep the base's files itself.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from pretrain.checkpoint import storage

USED_BY = "used_by"  # file in a checkpoint's folder: directories of the runs that need it, one a line


def prune(run_dir: str | Path, step: int, keep: int, keep_every: int = 0, held: int | None = None) -> None:
    """Removes old checkpoints: of those up to and with `step`, the newest `keep` stay, and multiples of `keep_every`.

    Steps after `step` are neither counted nor removed: a run that resumed from before a damaged checkpoint will
    overwrite it when it gets there. A checkpoint that another run needs stays as long as that run's folder is there,
    and that of step `held` until the next call.
    """
    done = [s for s in storage.steps(run_dir) if s <= step]
    for old in done[:-keep]:
        path = storage.directory(run_dir, old)
        if (keep_every and old % keep_every == 0) or old == held or _is_needed(path):
            continue
        # The manifest is removed first, so that the rest is not taken for a checkpoint if the process is killed here.
        (path / storage.MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path)


def note_use(path: Path, run_dir: Path) -> None:
    """Notes in a checkpoint's folder that the run in `run_dir` needs it. Raises OSError if it cannot be written.

    Does nothing if the folder is no checkpoint, such as a Hugging Face folder.
    """
    file, line = path / USED_BY, str(run_dir.resolve())
    if (path / storage.MANIFEST).is_file() and line not in _users(path):
        with file.open("a", encoding="utf-8") as lines:
            lines.write(f"{line}\n")


def tell_use(path: Path, run_dir: Path, say: Callable[[str], None]) -> None:
    """Writes beside a checkpoint that the run in `run_dir` needs it; a note is printed if that cannot be written."""
    try:
        note_use(path, run_dir)
    except OSError as error:
        say(
            f"warning: {error}; the run that made {path}, which this one needs, cannot know that, and may remove it; "
            "checkpoint.keep_every keeps checkpoints there"
        )


def _users(path: Path) -> list[str]:
    file = path / USED_BY
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def _is_needed(path: Path) -> bool:
    return any(Path(run).is_dir() for run in _users(path))


def remove_leftovers(run_dir: str | Path) -> None:
    """Removes temporary directories that killed saves left. No save may be in flight."""
    for path in (Path(run_dir) / "checkpoints").glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
