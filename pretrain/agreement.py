"""Agreement of all ranks on events that one rank meets alone: a signal to stop, and damaged training data.

The train loop calls it after each step, and every half second while it waits for the check of its data, so that all
ranks react to an event at the same step. The reaction itself is left to the train loop.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from configs import signals
from pretrain.data_check import DataCheck


class Agreement:
    """Signals and damaged data of all ranks, exchanged by collectives: all ranks call each method together.

    `first_step` is the number of steps that were done when this process started. `unchecked_from` is the number of
    steps that were done when the data was last known to match its checksums; later steps may have used damaged data.
    """

    def __init__(self) -> None:
        self.first_step = self.unchecked_from = 0

    def signal(self, step: int, check: DataCheck, watch: signals.Watch) -> int:
        """Returns the signal that any rank got, the same on all ranks, or 0 if none got one.

        Raises DamagedTrainingData on all ranks if any rank has found damaged data.
        """
        trained = step > self.first_step
        if trained:
            watch.agree()
        flags = [check.running, check.failed]  # `running` is read first, since the check may fail and end in between
        numbers = torch.tensor([watch.number, *flags], dtype=torch.float32)  # in host memory: no GPU is waited for
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        number, running, damaged = map(int, numbers.numpy())
        if trained:
            watch.work()
        if damaged:
            consequence = f"; checkpoints after step {self.unchecked_from} may have been trained on damaged data"
            check.raise_together(consequence if self.unchecked_from < step else "")
        if not running:
            self.unchecked_from = step
        return number

    def wait_for_check(self, step: int, check: DataCheck, watch: signals.Watch, say: Callable[[str], None]) -> int:
        """Waits until all ranks have checked their data or one got a signal; returns the signal, else 0.

        Raises DamagedTrainingData on all ranks if any rank has found damaged data.
        """
        if check.running:
            say("waiting until the training data is checked against its checksums")
        while not (number := self.signal(step, check, watch)) and self.unchecked_from < step:
            check.wait()
        return number
