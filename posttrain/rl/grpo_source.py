"""Batches and loss of GRPO: rollouts sampled with the current weights, and the clipped surrogate on them.

Each data-parallel replica samples its own groups with a gathered copy of the model. There is one update for each
rollout, so the probability ratio is 1 up to rounding. There is no separate inference engine, replay or KL penalty.
"""

import hashlib
import json
from typing import Any

import numpy as np
import torch

from configs.rl import GRPOSection
from posttrain.algorithms.aggregation import Aggregation, step_factor
from posttrain.algorithms.kl import KLEstimator, kl_estimate
from posttrain.algorithms.policy import ppo_clip
from posttrain.algorithms.token_batch import TokenBatch, sequences_of
from posttrain.chat.chat_format import ChatFormat
from posttrain.rl.policy_copy import PolicyCopy
from posttrain.rl.rollout import METRICS, RolloutRow, sample_rollout, training_rows
from posttrain.tasks.task import Task
from pretrain.batch_source import BatchSource
from pretrain.model.batch import Batch
from pretrain.parallel.engine import Engine

ARRAYS = ("tokens", "labels", "loss_mask", "positions", "segments", "advantages", "logprobs")


class RolloutSource(BatchSource):
    """Batch source whose rows are completions sampled with the current weights."""

    num_samples = None

    def __init__(self, settings: GRPOSection, task: Task, chat: ChatFormat, seed: int, seq_length: int) -> None:
        self.settings, self.seed, self.seq_length = settings, seed, seq_length
        self.task, self.chat, self.sources = task, chat, [task.name]
        # Covers what decides the prompts; other settings may change when a run continues, as the optimizer's may.
        self.fingerprint = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        self._policy: PolicyCopy | None = None
        self._metrics: dict[str, tuple[float, float]] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """Settings that decide which prompt each sample has."""
        return {"task": self.task.facts, "grpo": {"group_size": self.settings.group_size}}

    def prepare(self, engine: Engine, step: int) -> None:
        """Gathers a copy of the model's current weights for sampling. Collective: all ranks call it."""
        if self._policy is None:
            self._policy = PolicyCopy(engine)
        self._policy.refresh()

    def rows(self, samples: range) -> list[RolloutRow]:
        """Samples and scores whole groups and returns one row for each completion.

        Collective: one rank of each data-parallel replica samples and sends the rows to the replica's other ranks.
        """
        assert self._policy is not None, "the trainer calls prepare before it asks for rows"
        mesh, settings = self._policy.mesh, self.settings
        rollout, trained = None, (0, 0)
        if self._policy.samples_here:
            rollout = sample_rollout(self._policy.decoder, self.task, self.chat, settings, self.seed, samples)
            trained = rollout.trained()
        tokens, completions = (sum(column) for column in zip(*mesh.gather_json(trained), strict=True))
        aggregation = Aggregation(settings.aggregation)
        factor = step_factor(tokens, completions, self.task.max_new_tokens, aggregation)
        arrays = None
        if rollout is not None:
            rows = training_rows(rollout, settings, self.seq_length, self.chat.ids["<pad>"], factor)
            arrays = {name: np.stack([getattr(row, name) for row in rows]) for name in ARRAYS}
            arrays["metrics"] = np.array([rollout.metrics()[name] for name in METRICS])
        arrays = mesh.broadcast_arrays(arrays)
        self._metrics = {
            name: (total, count) for name, (total, count) in zip(METRICS, arrays["metrics"].tolist(), strict=True)
        }
        return [RolloutRow(source=0, **{name: arrays[name][i] for name in ARRAYS}) for i in range(len(samples))]

    def step_metrics(self) -> dict[str, tuple[float, float]]:
        """Returns (sum, count) of each rollout metric for the last rows of this replica."""
        return self._metrics


class GRPOLoss:
    """The clipped surrogate per token; see `pretrain.model.losses.LossFunction`.

    Before the first update of a process, the trainer's log-probabilities of the sampled tokens are compared with the
    sampler's. If they differ, the probability ratio would measure a difference in code, not in policy.
    """

    metrics: tuple[str, ...] = ("logprob_difference", "kl_rollout", "clipped")
    is_linear = False

    def __init__(self, settings: GRPOSection) -> None:
        self.settings, self.temperature = settings, settings.temperature
        self._checked = False

    def __call__(self, logprobs_BS: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the loss per token and the metrics per token, each [B, S].

        Raises ValueError if the first mean difference is above grpo.max_logprob_difference.
        """
        s = self.settings
        assert batch.logprobs is not None and batch.advantages is not None, "GRPO trains on rollouts alone"
        tokens = TokenBatch(
            logprobs_BS,
            mask=batch.loss_mask > 0,
            sequences=sequences_of(batch.segments),
            old_logprobs=batch.logprobs,
            advantages=batch.advantages,
        )
        loss_BS, clipped_BS = ppo_clip(tokens, s.clip_low, s.clip_high, s.dual_clip)
        with torch.no_grad():
            old_BS = torch.where(tokens.mask, batch.logprobs, 0.0)
            difference_BS = (logprobs_BS - old_BS).abs()
            if not self._checked:
                self._check(difference_BS, batch.loss_mask)
                self._checked = True
            metrics = {
                "logprob_difference": difference_BS,
                "kl_rollout": kl_estimate(old_BS, logprobs_BS, KLEstimator.K3),
                "clipped": clipped_BS.float(),
            }
        return loss_BS, metrics

    def _check(self, difference_BS: torch.Tensor, mask_BS: torch.Tensor) -> None:
        mean = float((difference_BS * mask_BS).sum() / mask_BS.sum().clamp(min=1e-12))
        if not mean <= self.settings.max_logprob_difference:
            raise ValueError(
                f"before the first update, log-probabilities of sampler and trainer differ by {mean:.4g} nats a token "
                f"(at most {float(difference_BS.max()):.4g}), above grpo.max_logprob_difference = "
                f"{self.settings.max_logprob_difference}; try train.precision=fp32: if it does not help, the "
                "cause is not rounding but other weights, positions or temperature in the sampler"
            )
