"""Messages are counted while other threads start theirs, as a save does beside the train loop."""

import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from pretrain.watchdog.message_counts import KEPT, MessageCounts

GROUP: Any = None  # whose global ranks `_counts` tells


@pytest.fixture
def threads_change_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Work:
    """Stand-in for torch's handle of a message, which is waited for."""


def _counts(monkeypatch: pytest.MonkeyPatch) -> MessageCounts:
    monkeypatch.setattr(dist, "get_global_rank", lambda group, peer: peer)
    return MessageCounts()


@pytest.mark.usefixtures("threads_change_often")
def test_a_wait_is_told_its_message_while_another_thread_starts_some(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, works, ends = _counts(monkeypatch), [Work() for _ in range(KEPT)], threading.Event()
    mine = Work()
    counts.start("recv", GROUP, 1, mine)

    def start_others() -> None:
        while not ends.is_set():
            for work in works:
                counts.start("send", GROUP, 2, work)

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


def test_a_thread_that_has_waited_leaves_the_wait_of_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, mine, others = _counts(monkeypatch), Work(), Work()
    counts.start("recv", GROUP, 1, mine)
    counts.start("send", GROUP, 1, others)
    received, sent = counts.of_work(mine), counts.of_work(others)
    assert received and sent

    def wait_beside() -> None:
        with counts.wait(sent):
            assert counts.waiting == received, "the main thread's wait is told first"

    with counts.wait(received):
        other = threading.Thread(target=wait_beside)
        other.start()
        other.join()
        assert counts.waiting == received
    assert counts.waiting is None


def test_messages_that_nccl_sends_at_once_are_counted_though_none_has_a_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, work = _counts(monkeypatch), Work()
    for one in (None, None, work):
        counts.start("send", GROUP, 1, one)
    found = counts.of_work(work)
    assert counts.by_name() == {"send 1": 3} and found is not None and found.number == 3


def test_another_operation_at_the_same_address_is_not_taken_for_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frees the handle of a message, and makes others until one lies where it lay."""
    counts, work = _counts(monkeypatch), Work()
    counts.start("recv", GROUP, 1, work)
    address = id(work)
    del work
    others: list[Work] = []
    while not others or id(others[-1]) != address:
        others.append(Work())
        assert len(others) < 10_000
    assert counts.of_work(others[-1]) is None
