"""Prepares the micro-batches of the next steps in a thread, so that a step waits neither for storage nor for numpy.

What a step is trained on does not change: steps are prepared in order, each from the numbers of its samples alone.
"""

import queue
import threading
from collections.abc import Callable, Iterable
from types import TracebackType

import torch

from pretrain.model.batch import Batch

STEPS_AHEAD = 2
_LEAVE_SECONDS = 10.0  # longest wait for the thread at the end, since a read may hang


class ReadAhead:
    """Context that prepares steps in a thread, up to STEPS_AHEAD before `next` is called for them.

    `prepare` is called with each step's number in `firsts`, that of its first sample; `restart` takes others. For a
    GPU `device` the batches are in pinned memory, from where they are sent without a wait. An error of `prepare` is
    raised by `next` when the turn of its step comes; nothing is prepared after it.
    """

    def __init__(self, prepare: Callable[[int], list[Batch]], firsts: Iterable[int], device: torch.device) -> None:
        self._prepare, self._device = prepare, device
        self._make_thread(firsts)

    def _make_thread(self, firsts: Iterable[int]) -> None:
        # Each thread has its own, since one that hangs in a read may still be there after the next has begun.
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(STEPS_AHEAD)
        self._stop = threading.Event()
        own = firsts, self._ready, self._stop
        self._thread = threading.Thread(target=self._run, args=own, name="read ahead", daemon=True)

    def __enter__(self) -> "ReadAhead":
        self._thread.start()
        return self

    def restart(self, firsts: Iterable[int]) -> None:
        """Prepares the steps of `firsts` from now on, and drops what is ready."""
        self.__exit__(None, None, None)
        self._make_thread(firsts)
        self._thread.start()

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

    def _run(
        self, firsts: Iterable[int], ready: "queue.Queue[list[Batch] | BaseException]", stop: threading.Event
    ) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # else pinning would start a context on the first GPU
            for first in firsts:
                batches = self._prepare(first)
                if self._device.type == "cuda":
                    batches = [batch.pin_memory() for batch in batches]
                ready.put(batches)
                if stop.is_set():
                    return
        except BaseException as error:
            ready.put(error)
