"""Messages are counted while other threads start theirs, as a save does beside the train loop."""

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from pretrain.watchdog.message_counts import KEPT, MessageCounts


@pytest.fixture
def threads_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("threads_change_often")
def test_a_wait_is_told_its_message_while_another_thread_starts_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_global_rank", lambda group, peer: peer)
    counts, works, ends = MessageCounts(), [object() for _ in range(KEPT)], threading.Event()
    group: Any = None  # whose ranks are told by the line above
    mine = object()
    counts.start("recv", group, 1, mine)

    def start_others() -> None:
        while not ends.is_set():
            for work in works:
                counts.start("send", group, 2, work)

    other = threading.Thread(target=start_others)
    other.start()
    try:
        for _ in range(2000):
            counts.of_work(mine)  # which may have been forgotten by now
            assert counts.by_name()["recv 1"] == 1
    finally:
        ends.set()
        other.join()
    found = counts.of_work(works[-1])
    assert found is not None and (found.kind, found.peer) == ("send", 2)
    assert found.number == counts.started["send", 2]
