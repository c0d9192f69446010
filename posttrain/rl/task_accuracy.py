"""Accuracy of the model in training on held-out prompts of a task, by greedy decoding and by sampling."""

from collections.abc import Callable

import torch

from configs.sampling import SamplingConfig
from posttrain.chat.format_interface import Chat
from posttrain.rl.policy_copy import PolicyCopy
from posttrain.rl.rollout import written
from posttrain.rl.text_sampler import TextSampler
from posttrain.tasks.episode_environment import Environment
from posttrain.tasks.task import Task, available
from pretrain.parallel.engine import Engine

BATCH = 256  # prompts decoded at once, which limits the key-value cache
DECODING = {"greedy": 0.0, "sampled": 1.0}  # name to temperature


class TaskAccuracy:
    """Evaluator of the mean score on the first `prompts` held-out prompts of a task.

    Prompts and random numbers depend on `seed` alone, so models with the same seed answer the same prompts.
    """

    def __init__(
        self,
        task: Task,
        chat: Chat,
        seed: int,
        prompts: int,
        policy: PolicyCopy | None = None,
        make: Callable[[], Environment] | None = None,
        room: int = 0,
    ) -> None:
        """Takes the first held-out prompts; with `make` they are episodes of `room` tokens at most."""
        self.task, self.chat, self.seed = task, chat, seed
        self.prompts = available(task, "heldout", prompts)
        self._policy, self._make, self._room = policy or PolicyCopy(), make, room

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        """Returns the mean score for each way of decoding. Collective: each rank scores a share.

        A way of decoding of whose answers none could be scored is left out, with a warning: the run goes on.
        """
        policy = self._policy
        policy.refresh(engine)
        share = range(policy.sampler, self.prompts, policy.samplers)
        # By way of decoding, and then of the score itself and of each reward: its sum and its number.
        sums = torch.tensor([self._sums(policy.text_sampler, share, t) for t in DECODING.values()])
        totals = engine.mesh.sum_over_world(sums if policy.leads else torch.zeros_like(sums)).tolist()
        found = {name: s / n for name, ((s, n), *_) in zip(DECODING, totals, strict=True) if n}
        if engine.mesh.is_main and (lacking := [name for name in DECODING if name not in found]):
            print(
                f"warning: none of the {' and '.join(lacking)} answers to {self.prompts} held-out prompts of "
                f"{self.task.name!r} could be scored, so they are not measured; mend the task's rewards",
                flush=True,
            )
        columns = [f"{self.task.name} answers", *(f"{self.task.name} answers, {name}" for name in self._parts)]
        means = (
            {name: s / n for name, (s, n) in zip(DECODING, by_decoding, strict=True) if n}
            for by_decoding in zip(*totals, strict=True)
        )
        return {column: values for column, values in zip(columns, means, strict=True) if values}

    @property
    def _parts(self) -> tuple[str, ...]:
        """The names of the task's rewards, if it has several."""
        names = self.task.reward_names
        return names if len(names) > 1 else ()

    def _sums(self, sampler: TextSampler, indices: range, temperature: float) -> list[tuple[float, float]]:
        """Returns (sum, number of answers) on the prompts `indices`: of the scores, then of each reward's values."""
        known: list[list[float]] = [[] for _ in range(1 + len(self._parts))]
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            problems = [self.task.problem(self.seed, "heldout", i) for i in batch]
            episodes = written(
                sampler,
                self.task,
                self.chat,
                problems,
                SamplingConfig(temperature=temperature),
                self.seed,
                [f"heldout/{i}" for i in batch],
                self._room,
                make=self._make,
            )
            scores = [episode.score for episode in episodes if episode.score is not None]
            known[0] += [score.value for score in scores if score.value is not None]
            for column, name in zip(known[1:], self._parts, strict=True):
                column += [score.parts[name] for score in scores if name in score.parts]
        return [(sum(column), float(len(column))) for column in known]
