"""This rank's micro-batches of one step after another, which a thread prepares ahead where their source allows it."""

from collections.abc import Iterator
from contextlib import ExitStack

import torch

from configs.train import TrainSection
from pretrain.data.batch_source import BatchSource, micro_batches, share_of_rank
from pretrain.data.read_ahead import ReadAhead
from pretrain.health.rewind_history import Rewinds
from pretrain.model.batch import Batch
from pretrain.parallel.engine import Engine
from pretrain.parallel.groups import Mesh


class StepRows:
    """Micro-batches of the steps of a run, without the samples that rewinds have taken out.

    Until `start` is called, and where the source calls collectives, rows are read when a step asks for them.
    """

    def __init__(self, source: BatchSource, train: TrainSection, mesh: Mesh, rewinds: Rewinds):
        self._source, self._train, self._mesh, self._rewinds = source, train, mesh, rewinds
        self._ahead: ReadAhead | None = None
        self._prepared: int | None = None  # the last step that the source has prepared

    def prepare(self, engine: Engine, step: int) -> None:
        """Has the source prepare the rows of a step, if that is not done. Collective."""
        if step != self._prepared:
            self._source.prepare(engine, step)
        self._prepared = step

    def start(self, stack: ExitStack, sample: int, steps: int) -> None:
        """Begins to prepare the next `steps` steps, of which the first begins with `sample`, until `stack` is left."""
        if self._source.reads_ahead:
            firsts = self._firsts(sample, steps)
            self._ahead = stack.enter_context(ReadAhead(self.of_step, firsts, self._mesh.device))

    def go_back(self, sample: int, steps: int) -> None:
        """Goes on with `sample`, as if all that came after it had not been asked for."""
        self._prepared = None
        if self._ahead:
            self._ahead.restart(self._firsts(sample, steps))

    def next(self, first: int) -> list[Batch]:
        """Returns the micro-batches of the next step, which begins with sample `first`."""
        return self._ahead.next() if self._ahead else self.of_step(first)

    def of_step(self, first: int) -> list[Batch]:
        """Reads this rank's micro-batches of the step whose first sample is `first`."""
        train, mesh = self._train, self._mesh
        share = share_of_rank(first, train.global_batch_size, mesh.dp_rank, mesh.layout.dp)
        return micro_batches(self._source.rows(share), train.micro_batch_size, share.start)

    def metrics(self) -> dict[str, float]:
        """Returns the means over all ranks of what the source measured in the last step's rows; collective."""
        own = self._source.step_metrics()
        if not own:
            return {}
        counted = self._mesh.counts_in_sums
        totals = self._mesh.sum_on_host(torch.tensor([v if counted else (0.0, 0.0) for v in own.values()]))
        return {name: float(total / max(count, 1e-12)) for name, (total, count) in zip(own, totals, strict=True)}

    def _firsts(self, sample: int, steps: int) -> Iterator[int]:
        return self._rewinds.firsts(sample, self._train.global_batch_size, steps)
