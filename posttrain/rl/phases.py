"""The division of a run's steps among rollouts, and of a rollout's samples among minibatches.

A rollout has samples for `batches` global batches, and is trained on for `epochs` passes. So step s, counted from 0,
belongs to rollout s // (batches * epochs). The order of samples is a pure function of (seed, rollout, epoch): a run
that goes on in the middle of a rollout takes the minibatches that are left.
"""

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Phases:
    """The division of steps into rollouts: `batches` minibatches of `batch_size` samples, `epochs` times."""

    batches: int
    epochs: int
    batch_size: int
    seed: int

    @property
    def steps(self) -> int:
        """The number of steps, which are updates, on each rollout."""
        return self.batches * self.epochs

    @property
    def samples(self) -> int:
        """The number of samples in a rollout."""
        return self.batches * self.batch_size

    def rollout_of(self, step: int) -> int:
        """Returns the number of the rollout that a step trains on."""
        return step // self.steps

    def begins(self, step: int) -> bool:
        """Whether a step is the first one on its rollout."""
        return step % self.steps == 0

    def sampled_with(self, rollout: int, staleness: int) -> int:
        """Returns the step after whose update a rollout is sampled, if sampling is `staleness` rollouts ahead."""
        return max(0, rollout - staleness) * self.steps

    def minibatch(self, step: int) -> list[int]:
        """Returns the samples of the rollout that a step trains on, in order.

        Where a rollout has one update these are all of its samples in their own order.
        """
        rollout, at = divmod(step, self.steps)
        epoch, batch = divmod(at, self.batches)
        order = list(range(self.samples))
        if self.steps > 1:
            random.Random(f"minibatches/{self.seed}/{rollout}/{epoch}").shuffle(order)
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]
