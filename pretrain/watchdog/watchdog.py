"""The watchdog of a rank: a thread that ends the run when the train loop makes no progress, with a sentence on why.

The loop says what it begins (`Activities`). An activity that takes `watchdog.factor` times as long as the longest of
its last ones is a hang. Every rank then writes what it does into `run.dir`/hang, since ranks that wait for each other
in a collective share nothing but files, and the lowest rank that answers compares them. If some rank is still within
the time of what it does, such as the main rank in an evaluation for which others wait, the run goes on. Else it hangs:
all ranks say why (`verdict`) and exit with `HUNG`, which tells a launcher to start the run again. A process that was
stopped as a whole, by Ctrl-Z for example, is not taken for one that hangs once it goes on.
"""

import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from configs import files
from configs.signals import HUNG
from configs.train import WatchdogConfig
from pretrain.logs.activities import END, EVALUATION, Activities
from pretrain.parallel.engine import Engine
from pretrain.watchdog.hang_verdict import verdict
from pretrain.watchdog.message_counts import count_messages
from pretrain.watchdog.rank_report import RankReport, report_of, stacks

FOLDER = "hang"  # in run.dir, with a numbered folder for each hang
VERDICT = "verdict.json"  # in the folder of a hang
LONGEST_GRACE = 30.0  # seconds that ranks wait for each other's reports
PATIENCE = 1.5  # times as long as now until a rank asks again whether the run hangs, if it went on
SAME_STEP = 3  # hangs at one step after which the run is not to be started again
GAVE_UP = 1
_STATES = {"T": "stopped by a signal", "t": "stopped by a debugger", "Z": "dead", "D": "waiting for a disk or network"}


class Watchdog:
    """Context manager that watches the activities of this rank. All ranks make it and leave it together.

    `on_hang` is called before the process is ended.
    """

    def __init__(
        self,
        settings: WatchdogConfig,
        engine: Engine,
        run_dir: str | Path,
        activities: Activities,
        on_hang: Callable[[], None],
    ):
        self._settings, self._engine, self._folder = settings, engine, Path(run_dir, FOLDER)
        self._mesh = engine.mesh
        self._activities, self._on_hang = activities, on_hang
        self._stop = threading.Event()
        self._number = 0
        self._processes: list[tuple[str, int]] = []
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._settings.enabled:
            count_messages()
            found = self._mesh.gather_json([platform.node(), os.getpid(), len(_hangs(self._folder))])
            self._processes = [(host, pid) for host, pid, _ in found]
            self._number = found[0][2] + 1  # rank 0's, since another node's view of the folder may be older
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        # A rank that was stopped, and goes on as its launcher ends it, finds that the others have ended.
        if error is not None and self._settings.enabled:
            self._end_if_hanging(_read_decision(self._hang_folder / VERDICT))

    def _limit(self, activity: str) -> float:
        """Returns the seconds after which `activity` counts as a hang; infinite for none."""
        known = self._activities.recent.get(activity)
        if activity == END or (activity == EVALUATION and not known):
            return float("inf")  # the check of much data may take any time, and so may tasks that are scored
        if not known:
            return self._settings.first_seconds
        return max(self._settings.least_seconds, self._settings.factor * max(known))

    def _watch(self) -> None:
        interval = min(1.0, self._settings.least_seconds / 10)
        last = looked = time.monotonic()
        mark, stopped, waited = 0.0, 0.0, 0.0
        while not self._stop.wait(interval):
            now, activities = time.monotonic(), self._activities
            with activities.lock:
                if activities.began != mark:
                    mark, stopped, waited = activities.began, 0.0, 0.0
                limit = self._limit(activities.name)
            stopped += max(0.0, now - last - 2 * interval - 1.0)  # if this thread did not run, nor did the process
            elapsed = now - mark - stopped
            last = now
            overdue = elapsed > limit
            is_late = overdue and elapsed > waited
            if not is_late and now - looked > self._settings.least_seconds / 5:
                looked = now
                is_late = self._hang_folder.exists()  # another rank reports, whose activity has a shorter limit
            if is_late:
                self._settle(elapsed, min(limit, self._settings.first_seconds), mark, overdue)
                last, waited = time.monotonic(), PATIENCE * elapsed  # the run goes on

    @property
    def _hang_folder(self) -> Path:
        return self._folder / str(self._number)

    def _settle(self, elapsed: float, limit: float, mark: float, overdue: bool) -> None:
        """Compares what all ranks do, and ends the process if the run hangs: if nothing was begun since time `mark`."""
        folder, rank = self._hang_folder, self._mesh.rank
        file = folder / VERDICT
        decision = _read_decision(file)  # there is one if this rank comes late, and it stands
        if decision is None:
            with contextlib.suppress(OSError):  # a full disk must not keep the run from ending
                self._write_report(folder, overdue)
            grace = min(LONGEST_GRACE, max(2.0, limit / 2))
            _wait(grace, lambda: len(_read(folder)) == len(self._processes))
            reports = _read(folder)
            decides = rank == min(reports, default=rank)
            if not decides:
                _wait(grace, file.exists)
            decision = _read_decision(file) or self._decide(reports, elapsed, limit, mark)
            if decides:
                with contextlib.suppress(OSError):
                    files.write_atomic(file, json.dumps(asdict(decision), indent=1).encode())
        self._number += 1
        self._end_if_hanging(decision)

    def _end_if_hanging(self, decision: "Decision | None") -> None:
        if decision is not None and decision.hangs:
            print(f"error: {decision.text}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            self._on_hang()
            os._exit(decision.status)

    def _write_report(self, folder: Path, overdue: bool) -> None:
        rank = self._mesh.rank
        folder.mkdir(parents=True, exist_ok=True)
        files.write_atomic(folder / f"rank_{rank}.txt", stacks().encode())
        activities, stage = self._activities, self._mesh.pp_rank
        own = report_of(rank, activities.step, activities.name, self._engine.micro_batches, stage, overdue)
        files.write_atomic(folder / f"rank_{rank}.json", own.as_json().encode())

    def _decide(self, reports: dict[int, RankReport], elapsed: float, limit: float, mark: float) -> "Decision":
        step = max((report.step for report in reports.values()), default=self._activities.step)
        # Ranks may wait for one whose activity is allowed more time, such as the main rank's evaluation.
        if self._activities.began > mark or not all(report.overdue for report in reports.values()):
            return Decision(False, step, "", 0)
        absent = {rank: _state(host, pid) for rank, (host, pid) in enumerate(self._processes) if rank not in reports}
        text = (
            f"no progress for {elapsed:.0f} s, where {limit:.0f} s are allowed ([watchdog]): "
            f"{verdict(reports, absent)}; stacks of all ranks are in {self._hang_folder}"
        )
        before = [_read_decision(folder / VERDICT) for folder in _hangs(self._folder)]
        if sum(told is not None and told.hangs and told.step == step for told in before) + 1 < SAME_STEP:
            return Decision(True, step, text, HUNG)
        text += f"; the run has hung {SAME_STEP} times at step {step}, so do not start it again as it is"
        return Decision(True, step, text, GAVE_UP)


@dataclass(frozen=True)
class Decision:
    """Whether the run hangs, in which step, why, and the exit status of all ranks if it does."""

    hangs: bool
    step: int
    text: str
    status: int


def _wait(seconds: float, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not until() and time.monotonic() < deadline:
        time.sleep(0.1)


def _read_decision(file: Path) -> Decision | None:
    try:
        return Decision(**json.loads(file.read_text()))
    except (OSError, ValueError):
        return None


def _read(folder: Path) -> dict[int, RankReport]:
    found = {}
    for path in folder.glob("rank_*.json"):
        with contextlib.suppress(OSError, ValueError):
            report = RankReport.from_json(path.read_text())
            found[report.rank] = report
    return found


def _hangs(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdigit()]


def _state(host: str, pid: int) -> str:
    """Says what is known of a process that does not answer."""
    process = f"process {pid} on {host}"
    if host != platform.node() or not Path("/proc/self/stat").exists():
        return f"{process} or its machine is stopped, dead or cut off"
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return f"{process} has ended"
    return f"{process} is {_STATES.get(letter, 'running, in code that keeps Python from answering')}"
