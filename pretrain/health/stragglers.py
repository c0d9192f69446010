"""Stragglers: ranks that compute for longer than others, for which all others wait in every step.

Each rank measures the time of its step less its waits for others, and gives it to the others with the sums of the next
step, so that nothing more is exchanged. On a GPU such waits happen on the device: there the time is the host's alone,
which shows slow rows and a slow processor, and no slow GPU.
"""

import platform
import statistics
import time
from collections import Counter
from collections.abc import Sequence

from configs.train import WatchdogConfig
from pretrain.health.not_finite import position
from pretrain.parallel.groups import Mesh
from pretrain.watchdog.message_counts import count_messages

STEPS = 10  # one after another, in which a rank must be slow
AGAIN = 1000  # such steps until it is told again


class BusyTime:
    """Measures, from its making on, the seconds in which this rank did not wait for others."""

    def __init__(self) -> None:
        self._counts = count_messages()
        self._began, self._waited = time.perf_counter(), self._counts.waited

    def seconds(self) -> float:
        return time.perf_counter() - self._began - (self._counts.waited - self._waited)


class Stragglers:
    """Compares the busy times of all ranks, step by step. Ranks of one pipeline stage have the same work."""

    def __init__(self, settings: WatchdogConfig, stages: Sequence[int], names: Sequence[str]):
        """`stages` and `names` are the pipeline stage of each rank, and what to call it."""
        self._factor, self._names = settings.straggler, names
        self._peers = [
            [other for other, its in enumerate(stages) if its == stage and other != rank]
            for rank, stage in enumerate(stages)
        ]
        self._slow = Counter[int]()  # steps, up to the last one, in which a rank was slow

    @classmethod
    def of_mesh(cls, settings: WatchdogConfig, mesh: Mesh) -> "Stragglers":
        """Makes the detector for the ranks of a run. Collective."""
        found = mesh.gather_json([mesh.pp_rank, f"{position(mesh)} on {platform.node()}"])
        return cls(settings, [stage for stage, _ in found], [name for _, name in found])

    def note(self, seconds: Sequence[float]) -> list[str]:
        """Takes the busy time of each rank in a step; returns a sentence for each that has become a straggler."""
        said = []
        for rank, own in enumerate(seconds):
            peers = [seconds[other] for other in self._peers[rank]]
            usual = statistics.median(peers) if peers else 0.0
            if not peers or own <= self._factor * usual:
                self._slow[rank] = 0
                continue
            self._slow[rank] += 1
            if self._slow[rank] % AGAIN == STEPS:
                said.append(
                    f"{self._names[rank]} is slow: {own:.3g} s of work in a step, {own / max(usual, 1e-9):.1f} times "
                    f"the median of ranks with the same work, for {self._slow[rank]} steps; the others wait for it"
                )
        return said
