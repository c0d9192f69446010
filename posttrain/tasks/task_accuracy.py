"""Accuracy of the model in training on held-out prompts of a task, by greedy decoding and by sampling."""

import torch

from configs.sampling import SamplingConfig
from posttrain.chat.chat import Chat
from posttrain.rl.policy_copy import PolicyCopy
from posttrain.rl.rollout import judge
from posttrain.tasks.task import Task, available
from pretrain.parallel.engine import Engine
from pretrain.sampling import SampledModel, generate

BATCH = 256  # prompts decoded at once, which limits the key-value cache
DECODING = {"greedy": 0.0, "sampled": 1.0}  # name to temperature


class TaskAccuracy:
    """Mean score on the first `prompts` held-out prompts; see `pretrain.heldout_loss.Evaluator`.

    Prompts and random numbers depend on `seed` alone, so models with the same seed answer the same prompts.
    """

    def __init__(self, task: Task, chat: Chat, seed: int, prompts: int, policy: PolicyCopy | None = None) -> None:
        self.task, self.chat, self.seed = task, chat, seed
        self.prompts = available(task, "heldout", prompts)
        self._policy = policy or PolicyCopy()

    def __call__(self, engine: Engine) -> dict[str, dict[str, float]]:
        """Returns the mean score for each way of decoding. Collective: each rank scores a share.

        A way of decoding of whose answers none could be scored is left out, with a warning: the run goes on.
        """
        policy = self._policy
        policy.refresh(engine)
        share = range(policy.sampler, self.prompts, policy.samplers)
        sums = torch.tensor([self._sums(policy.decoder, share, t) for t in DECODING.values()])
        totals = engine.mesh.sum_over_world(sums if policy.leads else torch.zeros_like(sums)).tolist()
        found = {name: s / n for name, (s, n) in zip(DECODING, totals, strict=True) if n}
        if engine.mesh.is_main and (lacking := [name for name in DECODING if name not in found]):
            print(
                f"warning: none of the {' and '.join(lacking)} answers to {self.prompts} held-out prompts of "
                f"{self.task.name!r} could be scored, so they are not measured; mend the task's rewards",
                flush=True,
            )
        return {f"{self.task.name} answers": found} if found else {}

    def _sums(self, decoder: SampledModel, indices: range, temperature: float) -> tuple[float, float]:
        """Returns (sum of scores, number of answers scored) on the prompts `indices`."""
        known: list[float] = []
        for start in range(0, len(indices), BATCH):
            batch = indices[start : start + BATCH]
            problems = [self.task.problem(self.seed, "heldout", i) for i in batch]
            completions = generate(
                decoder,
                [self.chat.render_prompt(problem.messages) for problem in problems],
                self.task.max_new_tokens,
                SamplingConfig(temperature=temperature),
                self.seed,
                stop_ids=self.chat.stop_ids,
                keys=[f"heldout/{i}" for i in batch],
            )
            scores = judge(self.task, self.chat, problems, completions)
            known += [score.value for score in scores if score.value is not None]
        return sum(known), float(len(known))
