"""Lock file of a run directory, removed again if the run ends before it has written anything."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(run_dir: Path, take: Callable[[IO[str]], bool]) -> Iterator[IO[str] | None]:
    """Context that holds the lock: `take` gets the open lock file and returns whether it could lock it.

    Yields the file, or None if `take` returned False. At the end the file and the folders that were made for it are
    removed if nothing else was written there.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    file = run_dir / LOCK_FILE
    new = not file.exists()
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(file, "a+", encoding="utf-8") as lock:
            if not take(lock):
                yield None
                return
            if not file.exists() or not os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                continue  # the previous holder removed the file after it was opened here
            before = set(run_dir.iterdir())
            try:
                yield lock
            finally:
                if new and set(run_dir.iterdir()) == before:
                    file.unlink()
                    with contextlib.suppress(OSError):  # one of them is not empty
                        for folder in made:
                            folder.rmdir()
            return
