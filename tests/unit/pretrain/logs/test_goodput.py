"""Goodput: every second of the starts of a run belongs to one kind of time, and lost steps are none that count."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from pretrain.logs.activities import EVALUATION, PREPARATION, TRAINING, Activities
from pretrain.logs.goodput import FILE, StartRecord, goodput, read, table
from pretrain.logs.start_recorder import StartRecorder


def test_the_kinds_of_time_sum_to_the_whole() -> None:
    """Adds up three starts: 100 steps in 200 s until a kill, then a start from step 60, and one from 150."""
    starts = [
        StartRecord(1000.0, 1260.0, 0, 100, {"start": 30.0, "first_step": 10.0, "training": 200.0, "saving": 20.0}),
        StartRecord(1300.0, 1400.0, 60, 150, {"start": 20.0, "training": 70.0, "preparation": 10.0}),
        StartRecord(1400.0, 1500.0, 150, 150, {"start": 40.0, "hang": 60.0}),
    ]
    assert goodput(starts) == pytest.approx(
        {
            "training": 200.0 * 0.6 + 70.0,
            "preparation": 10.0,
            "first_step": 10.0,
            "evaluation": 0.0,
            "saving": 20.0,
            "checking": 0.0,
            "rewinding": 0.0,
            "end": 0.0,
            "start": 30.0,
            "restart": 60.0,
            "lost": 80.0,
            "hang": 60.0,
            "idle": 40.0,
        }
    )
    assert sum(seconds for _, seconds, _ in table(starts)) == pytest.approx(500.0)
    assert sum(share for _, _, share in table(starts)) == pytest.approx(1.0)


def test_shares_as_they_are_printed_add_up_to_100_percent() -> None:
    seconds = {"start": 37.54, "training": 39.94, "preparation": 1.0, "first_step": 0.06, "saving": 0.32, "end": 0.1}
    for more in (0.0, 0.06, 3.33, 77.7):
        found = table([StartRecord(0.0, sum(seconds.values()) + more, 0, 9, seconds)])
        assert round(sum(float(f"{100 * share:.1f}") for _, _, share in found), 6) == 100.0
    assert table([]) == []


def test_steps_that_a_later_start_repeats_again_are_lost_too() -> None:
    starts = [StartRecord(0.0, 10.0, 0, 10, {"training": 10.0}), StartRecord(10.0, 10.0, 10, 10, {})]
    starts.append(StartRecord(10.0, 20.0, 5, 15, {"training": 10.0}))  # from an earlier checkpoint
    assert goodput(starts)["lost"] == 5.0


def test_the_recorder_keeps_all_starts(tmp_path: Path) -> None:
    """Stops the clock by hand: activities are told when they began."""
    before = StartRecord(1.0, 2.0, 0, 3, {"training": 1.0})
    (tmp_path / FILE).write_text(json.dumps({"starts": [asdict(before)]}))
    activities = Activities(time.monotonic() - 7.0)
    with StartRecorder(tmp_path, activities, writes=True).of_start(3) as recorder:
        for step, seconds in enumerate((4.0, 1.0, 1.0), 4):
            for name, ago in ((PREPARATION, 0.0), (TRAINING, seconds), (EVALUATION, 0.5)):
                activities.begin(name, step)
                activities.began -= ago
            recorder.update(step)
    first, second = read(tmp_path)
    assert first == before and (second.first_step, second.last_step) == (3, 6)
    assert second.seconds[TRAINING] == pytest.approx(3.0, abs=0.9), "the first step's extra time is apart"
    assert second.seconds["first_step"] == pytest.approx(3.0, abs=0.9)
    assert sum(second.seconds.values()) >= second.updated - second.began - 0.01  # rounded to milliseconds


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_is_set_adds_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    with StartRecorder(tmp_path, Activities(), writes=True).of_start(0) as recorder:
        set_to = time.time() + 86_400 * days
        monkeypatch.setattr("time.time", lambda: set_to)
        recorder.update(1)
    (start,) = read(tmp_path)
    lifetime = start.updated - start.began
    assert start.updated == set_to and 0 < lifetime < 43_200
    assert sum(start.seconds.values()) == pytest.approx(lifetime, abs=0.02)  # rounded to milliseconds


def test_only_one_rank_writes_and_a_broken_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    assert read(tmp_path) == [] and goodput([])["training"] == 0
    with StartRecorder(tmp_path, Activities(), writes=False).of_start(0) as recorder:
        recorder.update(1)
    assert (tmp_path / FILE).read_text() == "{"
