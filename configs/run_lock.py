"""The lock file of a run directory. It leaves no trace of a run that was refused before it wrote anything."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(run_dir: Path, take: Callable[[IO[str]], bool]) -> Iterator[IO[str] | None]:
    """Opens the lock file and gives it to `take`, which locks it or returns False: the context then has None.

    What is made for it, the file and missing folders, is removed at the end if nothing else has come into them.
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
                continue  # its last holder removed it between our opening and our locking
            before = set(run_dir.iterdir())
            try:
                yield lock
            finally:
                if new and set(run_dir.iterdir()) == before:
                    file.unlink()
                    with contextlib.suppress(OSError):  # something came into one of them
                        for folder in made:
                            folder.rmdir()
            return
