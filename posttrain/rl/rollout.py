"""Rollouts: groups of completions sampled from the current model, scored, and made into training rows.

Sample i of the run is completion i % group_size of prompt i // group_size. Prompt and random numbers are keyed by i, so
a step's prompts are a pure function of (seed, step), and a resumed run repeats none. The sampled tokens are trained on
as they are, never decoded and tokenized again. `posttrain.rl.grpo_source` decides which rank samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from configs.rl import GRPOSection
from configs.sampling import SamplingConfig
from data_pipeline.mixture.rows import Row
from posttrain.algorithms.advantages import AdvantageDialect, equal_groups, group_advantages
from posttrain.algorithms.aggregation import Aggregation, token_weight
from posttrain.chat.chat_format import ChatFormat
from posttrain.tasks.task import Attempt, Problem, Task, TaskScore
from pretrain.model import Decoder
from pretrain.sampling import Completion, generate

METRICS = ("reward", "equal_reward_groups", "completion_tokens", "truncated", "unscorable")


@dataclass(frozen=True)
class RolloutRow(Row):
    """Training row of a prompt and its completion. `loss_mask` is float32: the weight of each completion token.

    `advantages` and `logprobs` (of the sampling policy, at its temperature) are float32 [L], aligned with labels and 0
    outside the completion.
    """

    advantages: np.ndarray
    logprobs: np.ndarray


@dataclass
class Rollout:
    """Scored completions of whole groups, in sample order."""

    prompts: list[list[int]]
    completions: list[Completion]
    scores: list[TaskScore]
    group_size: int

    def rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (rewards, scored), both [groups, group size]; an unscorable sample has reward 0 and scored False."""
        values = torch.tensor([score.value or 0.0 for score in self.scores])
        scored = torch.tensor([score.value is not None for score in self.scores])
        return values.view(-1, self.group_size), scored.view(-1, self.group_size)

    def trained(self) -> tuple[int, int]:
        """Returns the numbers of (tokens, completions) that are trained on, which are all but the unscorable."""
        known = self.rewards()[1].flatten().tolist()
        lengths = [len(c.tokens) for c, k in zip(self.completions, known, strict=True) if k]
        return sum(lengths), len(lengths)

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Returns (sum, count) of each of `METRICS`."""
        rewards, scored = self.rewards()
        samples, known = len(self.scores), int(scored.sum())
        return {
            "reward": (float(rewards.sum()), known),
            "equal_reward_groups": (int(equal_groups(rewards, scored).sum()), len(rewards)),  # contribute no gradient
            "completion_tokens": (sum(len(c.tokens) for c in self.completions), samples),
            "truncated": (sum(not c.stopped for c in self.completions), samples),
            "unscorable": (samples - known, samples),
        }


def sample_rollout(
    decoder: Decoder, task: Task, chat: ChatFormat, settings: GRPOSection, seed: int, samples: range
) -> Rollout:
    """Samples and scores completions for `samples`. Raises ValueError if these are not whole groups."""
    if samples.start % settings.group_size or len(samples) % settings.group_size:
        raise ValueError(
            f"samples {samples.start} to {samples.stop} are not whole groups of grpo.group_size = {settings.group_size}"
        )
    problems = [task.problem(seed, "train", i // settings.group_size) for i in samples]
    prompts = [chat.render_prompt(problem.messages) for problem in problems]
    completions = generate(
        decoder,
        prompts,
        task.max_new_tokens,
        SamplingConfig(temperature=settings.temperature),
        seed,
        stop_ids=[chat.end_id],
        keys=[f"rollout/{i}" for i in samples],
    )
    scores = judge(task, chat, problems, completions)
    return Rollout(prompts, completions, scores, settings.group_size)


def judge(
    task: Task, chat: ChatFormat, problems: Sequence[Problem], completions: Sequence[Completion]
) -> list[TaskScore]:
    """Returns the task's score of each completion, or 0 if it was cut before it closed its turn."""
    closed = [i for i, completion in enumerate(completions) if completion.stopped]
    attempts = [Attempt(problems[i], chat.decode_answer(completions[i].tokens)) for i in closed]
    scores = [TaskScore(0.0, "truncated")] * len(completions)
    for i, score in zip(closed, task.score(attempts), strict=True):
        scores[i] = score
    return scores


def training_rows(
    rollout: Rollout, settings: GRPOSection, seq_length: int, pad_id: int, factor: float
) -> list[RolloutRow]:
    """Returns one row for each completion; an unscorable one has weight 0.

    Advantages, and with them the loss, are multiplied by `factor` (see `aggregation.step_factor`).
    """
    rewards, scored = rollout.rewards()
    advantages = factor * group_advantages(rewards, scored, AdvantageDialect(settings.advantage))
    aggregation = Aggregation(settings.aggregation)
    weights = [
        token_weight(len(completion.tokens), aggregation) if known else 0.0
        for completion, known in zip(rollout.completions, scored.flatten().tolist(), strict=True)
    ]
    parts = zip(rollout.prompts, rollout.completions, weights, advantages.flatten().tolist(), strict=True)
    return [_row(*part, seq_length=seq_length, pad_id=pad_id) for part in parts]


def _row(
    prompt: list[int], completion: Completion, weight: float, advantage: float, seq_length: int, pad_id: int
) -> RolloutRow:
    whole = np.array(prompt + completion.tokens, dtype=np.int64)
    inputs = len(whole) - 1  # the last token is a label and never an input
    if inputs > seq_length:
        raise ValueError(
            f"a prompt of {len(prompt)} and a completion of {len(completion.tokens)} tokens do not fit into "
            f"train.seq_length = {seq_length}; raise it, or lower task.max_new_tokens"
        )
    tokens = np.full(seq_length, pad_id, dtype=np.int64)
    labels, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    segments = np.full(seq_length, -1, dtype=np.int64)
    loss_mask, advantages, logprobs = np.zeros((3, seq_length), dtype=np.float32)
    tokens[:inputs], positions[:inputs], segments[:inputs] = whole[:-1], np.arange(inputs), 0
    answer = slice(len(prompt) - 1, inputs)  # position t predicts token t + 1
    labels[answer] = completion.tokens
    loss_mask[answer], advantages[answer], logprobs[answer] = weight, advantage, completion.logprobs
    return RolloutRow(tokens, labels, loss_mask, positions, segments, 0, advantages, logprobs)
