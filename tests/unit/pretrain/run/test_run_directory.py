"""Two runs in one directory: the second is refused, or waits if the first has got a signal and is saving."""

import fcntl
import threading
import time
from pathlib import Path

import pytest

from pretrain.run.run_directory import ENDING, _take, _write


def test_a_run_that_trains_is_not_waited_for_and_one_that_ends_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / ".lock", "a+") as first, open(tmp_path / ".lock", "a+") as second:
        assert _take(first, tmp_path)
        _write(first, "")
        began = time.monotonic()
        assert not _take(second, tmp_path)
        assert time.monotonic() - began < 30  # the lock is not given back, so a wait would take 300 seconds
        _write(first, ENDING)
        threading.Timer(0.5, lambda: fcntl.flock(first, fcntl.LOCK_UN)).start()
        assert _take(second, tmp_path) and time.monotonic() - began > 0.5
        words = f"waiting for the run in {tmp_path}, which got a signal to stop and is saving\n"
        assert capsys.readouterr().out == words
        _write(second, "")
        assert (tmp_path / ".lock").read_text() == ""


def test_what_a_killed_run_left_in_its_lock_file_holds_nobody_up(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(ENDING)
    with open(tmp_path / ".lock", "a+") as lock:
        assert _take(lock, tmp_path)
