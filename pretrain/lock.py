"""One training run in a run directory at a time, by a lock that the main rank holds.

The lock is the kernel's (flock): it goes when the process does, however that was. What it leaves out: file systems on
which two machines can both hold it.
"""

import contextlib
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from configs import signals
from configs.loader import ConfigError
from configs.run_lock import locked

if TYPE_CHECKING:
    from pretrain.parallel.groups import Mesh

ENDING = "ending"  # in the lock file of a run that was told to stop


@contextmanager
def only_run_in(run_dir: Path, mesh: "Mesh", watch: signals.Watch) -> Iterator[None]:
    """Holds the run directory's lock; a second run in it is refused on all ranks.

    It waits for one that was told to stop and is saving, as one whose launcher was killed may be when it is started
    again.
    """
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(locked(run_dir, lambda file: _take(file, run_dir))) if mesh.is_main else None
        if not mesh.gather_json(lock is not None)[0]:
            raise ConfigError(
                f"another process is training in {run_dir}; wait for it, stop it or choose another run.dir"
            )
        if lock is not None:
            held = lock
            _write(held, "")
            watch.on_first_signal(lambda: _write(held, ENDING))
        yield


def _take(lock: IO[str], run_dir: Path) -> bool:
    """Takes the lock, from a run that ends if need be. Returns whether it is ours."""
    deadline = time.monotonic() + signals.ORPHAN_SECONDS
    said = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            lock.seek(0)
            if lock.read() != ENDING or time.monotonic() > deadline:
                return False
        if not said:
            print(f"waiting for the run in {run_dir} that was told to stop and is saving", flush=True)
            said = True
        time.sleep(0.2)


def _write(lock: IO[str], text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk; a run that has ended meanwhile
        lock.truncate(0)
        lock.write(text)
        lock.flush()
