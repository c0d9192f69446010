"""Prepares the micro-batches of the next steps in a thread, so that a step waits neither for storage nor for numpy.

What a step is trained on does not change: steps are prepared in order, each from the numbers of its samples alone.
"""

import queue
import threading
from collections.abc import Callable
from types import TracebackType

import torch

from pretrain.model.batch import Batch

STEPS_AHEAD = 2
_LEAVE_SECONDS = 10.0  # longest wait for the thread at the end, since a read may hang


class ReadAhead:
    """Context that prepares steps in a thread, up to STEPS_AHEAD before `next` is called for them.

    `prepare` is called with each step's number in `firsts`, that of its first sample. For a GPU `device` the batches
    are in pinned memory, from where they are sent without a wait. An error of `prepare` is raised by `next` when the
    turn of its step comes; nothing is prepared after it.
    """

    def __init__(self, prepare: Callable[[int], list[Batch]], firsts: range, device: torch.device) -> None:
        self._prepare, self._firsts, self._device = prepare, firsts, device
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(STEPS_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)

    def __enter__(self) -> "ReadAhead":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        while not self._ready.empty():  # so that the thread, which may wait for room, sees that it shall stop
            self._ready.get()
        self._thread.join(_LEAVE_SECONDS)

    def next(self) -> list[Batch]:
        """Returns the micro-batches of the next step, and waits for them if they are not ready."""
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            raise ready
        return ready

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # else pinning would start a context on the first GPU
            for first in self._firsts:
                batches = self._prepare(first)
                if self._device.type == "cuda":
                    batches = [batch.pin_memory() for batch in batches]
                self._ready.put(batches)
                if self._stop.is_set():
                    return
        except BaseException as error:
            self._ready.put(error)
