"""Holds the files that a run is trained on against their checksums, once at its start.

Every rank reads its share of the files, so that each is read once. Few bytes are read before the first step; many in a
thread of the lowest priority while training goes on, and the last checkpoint waits for it unless a signal comes: it is
then saved with data unchecked, and the next start of the command checks all of it. What one rank finds, all learn where
they agree on signals (`pretrain.agreement`), and all stop. Leaves out what is read later: whether an id
is in the vocabulary is looked at with every row (`data_pipeline.mixture.rows`).
"""

import contextlib
import os
import sys
import threading
from collections.abc import Sequence
from types import TracebackType

from data_pipeline.core.integrity import DamagedData, Expected, check_files
from pretrain.parallel.groups import Mesh

FIRST_BYTES = 1_000_000_000  # up to so many are read before the first step, by all ranks together: some seconds
WAIT_SECONDS = 0.5  # from one look at signals to the next while nothing is left to do but to wait for the check
_LEAVE_SECONDS = 10.0  # a read that hangs does not keep the process from ending
_TOLD = 3


class DamagedTrainingData(DamagedData):
    """Files do not match their checksums. Raised on all ranks together."""


class DataCheck:
    """A context in which the check runs. `failed` may become true at any time on this rank."""

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
        return bool(self._found)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        """Waits until this rank has read its share, or it is time to look at signals."""
        self._thread.join(WAIT_SECONDS)

    def raise_together(self, trained: str) -> None:
        """Called on all ranks once they know that one has failed; `trained` says what may be spoilt.

        Errors: DamagedTrainingData, always.
        """
        found = [sentence for sentences in self._mesh.gather_json(self._found) for sentence in sentences]
        more = f"; and {len(found) - _TOLD} more files" if len(found) > _TOLD else ""
        raise DamagedTrainingData("; ".join(found[:_TOLD]) + more + trained)

    def _read(self) -> None:
        if sys.platform == "linux" and not self._at_once:
            with contextlib.suppress(OSError):  # of this thread alone: the steps' own threads go first
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        for file in self._mine:  # one by one, so that the first that is damaged is told while others are still read
            self._found += check_files([file], self._stop)
