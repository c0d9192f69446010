"""Records the time of each start of a run in time.json, on its main rank; `pretrain.logs.goodput` adds them up.

The file is written at most every `EVERY` seconds, by rename, and at the end. A start that is killed loses the time
since it was last written, which then counts as time in which nothing ran.
"""

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from configs.files import write_atomic
from pretrain.logs.activities import PREPARATION, START, TRAINING, Activities
from pretrain.logs.goodput import FILE, StartRecord, read

EVERY = 5.0  # seconds


class StartRecorder:
    """Recorder of one start of a run, which takes times from the `activities` of this rank. One rank of a run writes.

    with recorder.of_start(first_step):
        recorder.update(step)
    """

    def __init__(self, run_dir: Path, activities: Activities, writes: bool) -> None:
        self._path, self._activities, self._writes = run_dir / FILE, activities, writes
        self._earlier: list[StartRecord] = []
        self._record: StartRecord | None = None
        self._began = self._written = 0.0
        self._undone = 0  # steps of this start that a rewind undid

    @contextmanager
    def of_start(self, first_step: int) -> Iterator["StartRecorder"]:
        """Context of the training of a start that goes on after `first_step` steps; writes the record at the end."""
        self._began = time.monotonic() - _age()
        self._earlier = read(self._path.parent)
        self._record = StartRecord(0.0, 0.0, first_step, first_step)
        try:
            yield self
        finally:
            self._write()

    def update(self, step: int) -> None:
        """Notes that `step` steps are done, and writes the record if that is due."""
        assert self._record is not None
        self._record.last_step = step
        if time.monotonic() - self._written > EVERY:
            self._write()

    def rewind(self, steps: int) -> None:
        """Says that the last `steps` steps were done in vain."""
        self._undone += steps

    def hang(self) -> None:
        """Writes the record with the activity of the moment as a hang."""
        self._activities.hang()
        self._write()

    def _write(self) -> None:
        if not self._writes or self._record is None:
            return
        activities = self._activities
        with activities.lock:
            seconds = defaultdict(float, activities.totals)
            seconds[activities.name] += activities.elapsed()
            steps, first = activities.counts[TRAINING], activities.firsts.get(TRAINING, 0.0)
            training = activities.totals[TRAINING]
        if steps > 1:  # what the first step takes more than the mean of the others: compilation, first allocations
            extra = max(0.0, first - (training - first) / (steps - 1))
            seconds[TRAINING] -= extra
            seconds["first_step"] = extra
        for name in (TRAINING, PREPARATION):
            lost = seconds[name] * min(1.0, self._undone / max(1, steps))
            seconds[name] -= lost
            seconds["lost"] += lost
        # The clock may be set while a run trains, to its true time most likely: no second is gained or lost by that.
        now, age = time.time(), time.monotonic() - self._began
        seconds[START] += max(0.0, age - sum(seconds.values()))
        self._record.began, self._record.updated = now - age, now
        self._record.seconds = {name: round(value, 3) for name, value in seconds.items()}
        self._written = time.monotonic()
        records = [asdict(record) for record in (*self._earlier, self._record)]
        try:
            write_atomic(self._path, json.dumps({"starts": records}, indent=1).encode())
        except OSError:
            return  # a full disk is told by the checkpoints and the metrics; time goes on without being recorded


def _age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")  # see proc(5)
    except (OSError, AttributeError):
        return 0.0
