"""Check of a run's training data against its checksums, each time that the run is started.

Every rank reads its share of the files. Up to FIRST_BYTES are read before anything is written (`check_first`), and once
more before the first step, by then from memory. More than that is read by a thread of the lowest priority while
training goes on, and the run saves its last checkpoint only when that thread is done, or when a signal comes: the
checkpoint is then marked as unchecked, and the next start of the command checks all of the data. If one rank finds
damage, all ranks learn of it where they exchange signals (`pretrain.run.agreement`), and all stop. Damage that happens
after the check is left out, except that every row's token ids are checked against the vocabulary
(`data_pipeline.mixture.rows`).
"""

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from types import TracebackType

from data_pipeline.core.integrity import FIRST_BYTES, DamagedData, Expected, check_files
from pretrain.parallel.groups import Mesh

WAIT_SECONDS = 0.5  # between two exchanges of signals while the run only waits for the check
_LEAVE_SECONDS = 10.0  # longest wait for the thread at the end, since a read may hang
_NAMED = 3  # damaged files named in the message


class DamagedTrainingData(DamagedData):
    """Error for damage of the training data that all ranks know of; raised on all of them together."""

    of_all_ranks = True


class DataCheck:
    """Context that checks this rank's share of the files in a thread, and stops the thread at its end."""

    def __init__(self, files: Sequence[Expected], mesh: Mesh) -> None:
        by_size = sorted(files, key=lambda file: (-(file.size or 0), str(file.path)))
        self._mine = by_size[mesh.rank :: mesh.layout.world_size]
        self._at_once = sum(file.size or 0 for file in files) <= FIRST_BYTES
        self._mesh = mesh
        self._found: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="data check", daemon=True)

    def __enter__(self) -> "DataCheck":
        self._thread.start()
        if self._at_once:
            self._thread.join()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(_LEAVE_SECONDS)

    @property
    def failed(self) -> bool:
        """Whether this rank has found a damaged file so far."""
        return bool(self._found)

    @property
    def running(self) -> bool:
        """Whether this rank is still reading its files."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Waits until this rank has read its files, but at most WAIT_SECONDS."""
        self._thread.join(WAIT_SECONDS)

    def raise_together(self, consequence: str) -> None:
        """Raises DamagedTrainingData that names damaged files of all ranks and ends in `consequence`.

        Collective: all ranks call it once they know that one of them has found damage.
        """
        found = [sentence for sentences in self._mesh.gather_json(self._found) for sentence in sentences]
        more = f"; and {len(found) - _NAMED} more files" if len(found) > _NAMED else ""
        raise DamagedTrainingData("; ".join(found[:_NAMED]) + more + consequence)

    def _read(self) -> None:
        if sys.platform == "linux" and not self._at_once:
            with contextlib.suppress(OSError):  # lowers this thread's priority alone, below that of the training steps
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for file in self._mine:  # one by one, so that damage is known before all files are read
            self._found += check_files([file], self._stop)


def check_first(files: Sequence[Expected], mesh: Mesh, consequence: str) -> None:
    """Checks the files of training data that is small enough to be read before anything is written. Collective.

    Raises DamagedTrainingData on all ranks if any rank finds damage; its message ends in `consequence`.
    """
    if sum(file.size or 0 for file in files) > FIRST_BYTES:
        return
    with DataCheck(files, mesh) as check:
        if any(mesh.gather_json(check.failed)):
            check.raise_together(consequence)
