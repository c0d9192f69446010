"""What any rank may meet at any time, a signal or damaged data, becomes known to all ranks at the same step.

The train loop asks after each step, and again and again while it waits for the check of its data. What it leaves out:
what is then done about it.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from configs import signals
from pretrain.data_check import DataCheck
from pretrain.parallel.groups import Mesh


class Agreement:
    """All ranks call its methods together.

    `first_step` is the one that this process goes on from. `unchecked_from` is the step from which on the run has
    trained on data that is not held against its checksums yet.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.first_step = self.unchecked_from = 0
        self._mesh = mesh

    def signal(self, step: int, check: DataCheck, watch: signals.Watch) -> int:
        """The signal that any rank got, the same on all; 0 if none did. Errors: DamagedTrainingData, also on all."""
        trained = step > self.first_step
        if trained:
            watch.agree()
        flags = [check.running, check.failed]  # in this order: it may fail and end meanwhile
        numbers = torch.tensor([watch.number, *flags], dtype=torch.float32, device=self._mesh.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        number, running, damaged = numbers.tolist()
        if trained:
            watch.work()
        if damaged:
            spoilt = self.unchecked_from < step
            check.raise_together(f"; what was saved after step {self.unchecked_from} may be spoilt" if spoilt else "")
        if not running:
            self.unchecked_from = step
        return int(number)

    def wait_for_check(self, step: int, check: DataCheck, watch: signals.Watch, say: Callable[[str], None]) -> int:
        """Waits until all data is held against its checksums, or for a signal, which it returns (else 0).

        Errors: DamagedTrainingData, on all ranks.
        """
        if check.running:
            say("waits for the training data to be held against its checksums")
        while not (number := self.signal(step, check, watch)) and self.unchecked_from < step:
            check.wait()
        return number
