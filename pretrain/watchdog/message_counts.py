"""Point-to-point messages that this rank has sent and received, counted for the watchdog.

torch's flight recorder keeps the collectives of gloo and NCCL, but not gloo's messages between two ranks, such as those
of a pipeline. So `count_messages` wraps the methods of torch's process groups that start one, and the wait for it.
"""

import functools
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

KEPT = 256  # started messages that are remembered, so that a wait can be told which one it waits for


@dataclass(frozen=True)
class PeerMessage:
    """A message between this rank and the global rank `peer`; `number` counts those of its kind with that peer."""

    kind: str  # "send" or "recv"
    peer: int
    number: int


class MessageCounts:
    """Counts of messages by kind and peer, and the message that this rank waits for at the moment, if any.

    Messages start, and are waited for, in several threads, a save's among them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.started: Counter[tuple[str, int]] = Counter()
        self.waited = 0.0  # seconds that the main thread has waited, for messages and collectives
        self._waits: dict[int, PeerMessage] = {}  # by thread
        self._works: deque[tuple[weakref.ref[Any], PeerMessage]] = deque(maxlen=KEPT)

    def start(self, kind: str, group: dist.ProcessGroup, peer: int, work: Any) -> None:
        """Counts a message to or from member `peer` of `group`, which `work` waits for.

        NCCL returns no `work` for one of several messages that it sends at once.
        """
        rank = dist.get_global_rank(group, peer)
        with self._lock:
            self.started[kind, rank] += 1
            if work is not None:  # a reference that is not weak would keep the message's tensor
                self._works.append((weakref.ref(work), PeerMessage(kind, rank, self.started[kind, rank])))

    def of_work(self, work: Any) -> PeerMessage | None:
        """Returns the message that `work` waits for; None if it is none, or one long ago."""
        with self._lock:
            return next((message for found, message in reversed(self._works) if found() is work), None)

    @contextmanager
    def wait(self, message: PeerMessage) -> Iterator[None]:
        """Says, as long as the context lasts, that this thread waits for `message`."""
        thread = threading.get_ident()
        with self._lock:
            self._waits[thread] = message
        try:
            yield
        finally:
            with self._lock:
                del self._waits[thread]

    @property
    def waiting(self) -> PeerMessage | None:
        """The message that the main thread waits for, or else one that another thread waits for; None for none."""
        with self._lock:
            first = self._waits.get(threading.main_thread().ident or 0)
            return first or next(iter(self._waits.values()), None)

    def by_name(self) -> dict[str, int]:
        """Returns the number of started messages by "kind peer"."""
        with self._lock:
            return {f"{kind} {peer}": count for (kind, peer), count in self.started.items()}


COUNTS = MessageCounts()


@functools.cache
def count_messages() -> MessageCounts:
    """Counts, from now on, the messages of all process groups of this process; wraps torch's methods only once."""

    def counting(method: Any, kind: str) -> Any:
        @functools.wraps(method)
        def start(group: Any, tensors: Any, peer: int, *args: Any, **options: Any) -> Any:
            work = method(group, tensors, peer, *args, **options)
            COUNTS.start(kind, group, peer, work)
            return work

        return start

    for kind in ("send", "recv"):
        setattr(dist.ProcessGroup, kind, counting(getattr(dist.ProcessGroup, kind), kind))
    wait, main = dist.Work.wait, threading.main_thread().ident

    @functools.wraps(wait)
    def watched(work: Any, *args: Any, **options: Any) -> Any:
        message, began = COUNTS.of_work(work), time.perf_counter()
        try:
            with COUNTS.wait(message) if message else nullcontext():
                return wait(work, *args, **options)
        finally:
            if threading.get_ident() == main:
                COUNTS.waited += time.perf_counter() - began

    setattr(dist.Work, "wait", watched)  # noqa: B010 - mypy knows the attribute as a method
    return COUNTS
