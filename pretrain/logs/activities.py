"""Activities of a rank of a training run, one after another: the clock of the watchdog and of goodput."""

import threading
import time
from collections import Counter, defaultdict, deque

REMEMBERED = 20  # durations of each activity that are kept

START = "start"
PREPARATION = "preparation"  # of a step's rows: reading ahead, or sampling rollouts
TRAINING = "training"
EVALUATION = "evaluation"
SAVING = "saving"
CHECKING = "checking"  # a step that is computed again
REWINDING = "rewinding"  # going back to a checkpoint, after a spike
END = "end"  # after the last step: the last checkpoint is written, and the data check is waited for
HANG = "hang"


class Activities:
    """Activities of the train loop, one after another; `begin` ends the one before. Threads may read them."""

    def __init__(self, began: float | None = None) -> None:
        """`began` is the time, by time.monotonic, at which `START` began; by default it is now."""
        self.lock = threading.Lock()
        self.name, self.step = START, 0
        self.began = time.monotonic() if began is None else began
        self.recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))  # seconds each took
        self.totals: dict[str, float] = defaultdict(float)  # seconds, of the activities that have ended
        self.firsts: dict[str, float] = {}  # seconds that the first of each took
        self.counts: Counter[str] = Counter()

    def begin(self, name: str, step: int) -> None:
        """Ends the current activity of this rank, and begins activity `name`, which belongs to `step`."""
        now = time.monotonic()
        with self.lock:
            seconds = now - self.began
            self.recent[self.name].append(seconds)
            self.firsts.setdefault(self.name, seconds)
            self.totals[self.name] += seconds
            self.counts[self.name] += 1
            self.name, self.step, self.began = name, step, now

    def hang(self) -> None:
        """Says that the activity of the moment hangs, so that its time counts as that of a hang."""
        with self.lock:
            self.name = HANG

    def elapsed(self) -> float:
        """Seconds since the activity of the moment began."""
        return time.monotonic() - self.began
