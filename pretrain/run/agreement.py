"""Agreement of all ranks on events that one rank meets alone: a signal to stop, and damaged training data.

The train loop asks all ranks after a few steps each time, and every half second while it waits for the check of its
data, so that all ranks react to an event at the same step. How many steps it waits depends on the time that steps take,
of which the ranks agree on the longest. The reaction itself is left to the train loop.
"""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from configs import signals
from pretrain.data.batch_source import BatchSource
from pretrain.data.data_check import DataCheck

SECONDS = 1.0  # from one exchange to the next, about, if steps are shorter than that
POLL_SECONDS = 0.2  # from one look for what another process makes to the next
SAYS_SECONDS = 60.0  # from one message that it is awaited to the next
MAX_STEPS = 10  # from one exchange to the next, so that steps that become slow are noticed soon


class Agreement:
    """Signals and damaged data of all ranks, exchanged by collectives: all ranks call each method together.

    `first_step` is the number of steps that were done when this process started. `unchecked_from` is the number of
    steps that were done when the data was last known to match its checksums; later steps may have used damaged data.
    """

    def __init__(self) -> None:
        self.first_step = self.unchecked_from = 0
        self._next = self._last = 0  # steps done at the next exchange and at the last one
        self._time = time.monotonic()

    def go_back(self, step: int) -> None:
        """Says that the run has gone back to step `step`; the next exchange is after the next step."""
        self._next = self._last = step
        self._time = time.monotonic()
        self.unchecked_from = min(self.unchecked_from, step)

    def is_due(self, step: int) -> bool:
        """Whether all ranks shall call `signal` when `step` steps are done; the same on all ranks."""
        return step >= self._next

    def consequence(self, step: int) -> str:
        """Says, as the end of a sentence, what damaged data may have done to a run after `step` steps."""
        if self.unchecked_from >= step:
            return ""
        return f"; checkpoints after step {self.unchecked_from} may have been trained on damaged data"

    def signal(self, step: int, check: DataCheck, watch: signals.Watch) -> int:
        """Returns the signal that any rank got, the same on all ranks, or 0 if none got one.

        Raises DamagedTrainingData on all ranks if any rank has found damaged data.
        """
        trained = step > self.first_step
        if trained:
            watch.agree()
        flags = [check.running, check.failed]  # `running` is read first, since the check may fail and end in between
        now = time.monotonic()
        seconds = (now - self._time) / max(1, step - self._last)
        numbers = torch.tensor([watch.number, *flags, seconds], dtype=torch.float64)  # on the host
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        number, running, damaged = map(int, numbers.numpy()[:3])
        self._time, self._last = now, step
        self._next = step + steps_between(float(numbers.numpy()[3]), step - self.first_step)
        if trained:
            watch.work()
        if damaged:
            check.raise_together(self.consequence(step))
        if not running:
            self.unchecked_from = step
        return number

    def wait_for_rows(
        self, source: BatchSource, step: int, check: DataCheck, watch: signals.Watch, say: Callable[[str], None]
    ) -> int:
        """Waits while another process makes the rows of the step after `step` steps, or until a rank got a signal.

        Returns the signal, else 0. Raises DamagedTrainingData as `signal`.
        """
        said = time.monotonic()
        while True:
            awaited = torch.tensor(source.is_awaited(step))
            dist.all_reduce(awaited, op=dist.ReduceOp.MAX)
            if not awaited:
                return 0
            if number := self.signal(step, check, watch):
                return number
            if time.monotonic() - said > SAYS_SECONDS:
                said = time.monotonic()
                say(f"step {step} is done; waiting for the command that samples to write the next rollout")
            time.sleep(POLL_SECONDS)

    def wait_for_check(self, step: int, check: DataCheck, watch: signals.Watch, say: Callable[[str], None]) -> int:
        """Waits until all ranks have checked their data or one got a signal; returns the signal, else 0.

        Raises DamagedTrainingData on all ranks if any rank has found damaged data.
        """
        if check.running:
            say("waiting until the training data is checked against its checksums")
        while not (number := self.signal(step, check, watch)) and self.unchecked_from < step:
            check.wait()
        return number


def steps_between(seconds: float, done: int) -> int:
    """Returns after how many steps ranks exchange signals again, if a step takes `seconds` and `done` steps are done.

    The first steps are often slower than those that follow them, so there are more exchanges at the start.
    """
    return max(1, min(MAX_STEPS, done // 3, int(SECONDS / max(seconds, 1e-9))))
